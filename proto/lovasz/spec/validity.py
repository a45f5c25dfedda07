"""A mask of valid pixels, beside ``ignore_index``: it is put into the labels, as a label that all terms ignore."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from lovasz.spec.arrays import check_dense, is_torch, numpy_array
from lovasz.spec.errors import InvalidInput
from lovasz.spec.labels import too_large, wrong_type
from lovasz.spec.terms import WeightedSum

_BYTE = 255


def masked(logits: Sequence[int], labels: Any, valid: Any, loss: WeightedSum) -> tuple[Any, WeightedSum]:
    """Labels that are void where ``valid`` is false, and the loss that ignores them.

    Args:
        logits: shape of the logits.
        labels: an array of NumPy or a tensor of torch.
        valid: bool, in the shape of the labels, or with 1 along some axes; an axis of size 1 after the first may be
            there or not. A tensor, or an array of any framework.

    Raises:
        InvalidInput: the mask is not such an array, the terms ignore different labels, or the shapes do not fit; or a
            valid pixel has the label that stands for void here, where no term ignores a label.
    """
    layout = loss.layout(tuple(logits), tuple(labels.shape), may_be_empty=True)
    void = _void_label(loss, layout.label_values)
    is_array = isinstance(labels, np.ndarray)
    mask = _mask_like(labels, valid)
    if mask.ndim == labels.ndim + 1 and mask.shape[1] == 1:  # (N, 1, H, W) for labels (N, H, W)
        mask = mask.reshape(mask.shape[0], *mask.shape[2:])
    elif mask.ndim == labels.ndim - 1 and mask.ndim > 0 and labels.shape[1] == 1:
        mask = mask.reshape(mask.shape[0], 1, *mask.shape[1:])
    if mask.ndim != labels.ndim or any(m not in (1, n) for m, n in zip(mask.shape, labels.shape, strict=True)):
        raise InvalidInput(
            "valid",
            f"got shape {tuple(mask.shape)}; expected {tuple(labels.shape)}, as the labels have, or 1 along some axes",
        )
    labels = _wide(labels, void)
    if all(term.ignore_index is None for _, term in loss.terms):
        _check_labels(labels, mask, void, layout.label_values)
    if is_array:
        return np.where(mask, labels, labels.dtype.type(void)), _ignoring(loss, void)
    return labels.masked_fill(~mask, void), _ignoring(loss, void)


def _check_labels(labels: Any, mask: Any, void: int, label_values: int) -> None:
    """Refuses valid pixels with the void label, which is no class. Waits for a GPU."""
    wrong = (labels == void) & mask
    if not wrong.any():
        return
    place = (np.argwhere(wrong) if isinstance(wrong, np.ndarray) else wrong.nonzero())[0].tolist()
    raise InvalidInput(
        "labels",
        f"got {void} at index {place}, where valid is True; expected a value in [0, {label_values}) (for void pixels "
        f"set ignore_index={void} in every term)",
    )


def _mask_like(labels: Any, valid: Any) -> Any:
    """The mask as the labels are: an array, or a tensor on their device."""
    is_tensor = is_torch(valid)
    if is_tensor:
        check_dense("valid", valid)
    if isinstance(labels, np.ndarray):
        valid = numpy_array("valid", valid.detach().cpu() if is_tensor else valid)
        mask: Any = valid
        is_bool = mask.dtype == np.bool_
    elif is_tensor:
        mask = valid.detach().to(labels.device)
        is_bool = str(mask.dtype) == "torch.bool"
    else:
        array = numpy_array("valid", valid)
        is_bool = array.dtype == np.bool_
        mask = labels.new_tensor(array if is_bool else 0).bool()
        valid = array
    if not is_bool:
        raise InvalidInput(
            "valid",
            f"got element type {valid.dtype}; expected bool: True where the pixel takes part (valid.bool(), valid > 0)",
        )
    return mask


def _wide(labels: Any, void: int) -> Any:
    """Labels of a type that holds ``void``, and in which torch can fill it in and compare."""
    name, is_array = str(labels.dtype).removeprefix("torch."), isinstance(labels, np.ndarray)
    fits = 0 <= void <= _BYTE
    if "float" in name:  # Of 16 bits, the coarsest holds all whole numbers up to 256.
        return labels if fits else labels.astype(np.float64) if is_array else labels.double()
    if name != "bool" and not name.startswith(("int", "uint")):
        raise wrong_type(name)
    not_by_torch = () if is_array else ("uint16", "uint32", "uint64")
    if fits and name not in ("bool", "int8", *not_by_torch):
        return labels
    wide = labels.astype(np.int64) if is_array else labels.long()
    if name == "uint64" and (wide < 0).any():
        raise too_large((1 << 64) + int(wide[wide < 0].max()))
    return wide


def _void_label(loss: WeightedSum, label_values: int) -> int:
    """A label that all terms ignore, or that they can ignore as it is no other label."""
    ignored = {term.ignore_index for _, term in loss.terms}
    labels = ignored - {None}
    if not labels:
        return _BYTE if label_values <= _BYTE else -1
    void = min(label for label in labels if label is not None)
    if len(labels) > 1 or (None in ignored and 0 <= void < label_values):
        given = ", ".join(map(str, sorted(ignored, key=str)))
        raise InvalidInput(
            "valid",
            f"got a mask for terms whose ignore_index differs ({given}); expected the same in all terms",
        )
    return void


@lru_cache(maxsize=64)
def _ignoring(loss: WeightedSum, void: int) -> WeightedSum:
    return WeightedSum(tuple((weight, replace(term, ignore_index=void)) for weight, term in loss.terms))
