"""Arrays of other frameworks, as arrays of NumPy; which tensors of torch can be read; fast copies."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from lovasz.spec.errors import InvalidInput

PART_ELEMENTS = 1 << 15
"""In a part of a copy: torch converts as many in the calling thread, without waking its other threads."""


def is_torch(value: object) -> TypeGuard[Any]:
    """Whether the value is a torch tensor. Does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def numpy_array(field: str, value: Any) -> npt.NDArray[Any]:
    """An array of any framework as an array of NumPy, read by ``__array__`` or DLPack; without a copy if possible.

    Raises:
        InvalidInput: the value is not an array, or cannot be read on the host.
    """
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise InvalidInput(
            field,
            "got a masked array, whose mask has no effect here; expected one without (labels.filled(255) "
            "with ignore_index=255)",
        )
    if isinstance(value, np.ndarray):
        return np.asarray(value)  # A matrix stays one in every shape.
    readers: list[Callable[[Any], npt.NDArray[Any]]] = []
    if hasattr(value, "__array__") and not isinstance(value, np.generic | type):
        readers.append(np.asarray)
    if hasattr(value, "__dlpack__") and not isinstance(value, type):
        readers.append(np.from_dlpack)
    problem = ""
    for read in readers:
        try:
            return read(value)
        except Exception as error:  # Each framework raises its own.
            first_line = str(error).partition("\n")[0]
            problem = problem or f", which cannot be read as an array of NumPy ({first_line})"
    cure = f" (torch.as_tensor makes one of a {type(value).__name__})" if isinstance(value, list | tuple) else ""
    raise InvalidInput(
        field,
        f"got {type(value).__name__}{problem}; expected a numpy array, a torch tensor, or an array with __array__ or "
        f"__dlpack__{cure}",
    )


def parts(array: npt.NDArray[Any], other: npt.NDArray[Any]) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Pairs of views of two arrays of one shape, which are to be copied one by one, in either direction.

    If the other array is large and has its classes last in memory (torch's ``channels_last``), the views are small
    enough for the processor's cache, and a copy takes a fifth of the time. Else it is one pair: the arrays themselves.

    Args:
        array: contiguous, shape (N, C, *spatial).
        other: in any order.
    """
    rows = other
    if other.size > PART_ELEMENTS and other.ndim > 2 and not other.flags.c_contiguous:
        rows = np.moveaxis(other, 1, -1)
    if rows is other or not rows.flags.c_contiguous:
        yield array, other
        return
    images, classes = other.shape[:2]
    rows, planes = rows.reshape(images, -1, classes), array.reshape(images, classes, -1)
    pixels = max(1, PART_ELEMENTS // classes)
    for image in range(images):
        for start in range(0, rows.shape[1], pixels):
            yield planes[image, :, start : start + pixels], rows[image, start : start + pixels].T


def check_dense(field: str, tensor: Any) -> None:
    """Refuses a tensor of torch whose values are not in memory, or not one for each place of its shape.

    Raises:
        InvalidInput: it is sparse, nested, on the device ``meta``, made of other tensors (DTensor), or inside
            forward-mode differentiation, ``torch.func``, ``torch.vmap`` or ``torch.jit.trace``.
    """
    if sys.modules["torch"].jit.is_tracing():
        raise InvalidInput(
            field,
            "got a tensor inside torch.jit.trace, which this loss does not support; expected a plain tensor "
            "(trace the model without the loss, and compute the loss from its outputs)",
        )
    if tensor.is_meta:
        raise InvalidInput(field, "got a tensor on the device meta, which has no values; expected one with values")
    if tensor.is_nested:
        raise InvalidInput(field, "got a nested tensor; expected a dense one")
    layout = str(tensor.layout)
    if layout != "torch.strided":
        raise InvalidInput(field, f"got a tensor of layout {layout}; expected a dense one")
    try:
        has_memory = bool(tensor.data_ptr()) or not tensor.numel()
    except RuntimeError:
        has_memory = False
    if not has_memory:
        raise InvalidInput(
            field,
            "got a tensor without memory, as inside torch.func.grad, jvp or vmap, which this loss does not support; "
            "expected a plain tensor (for gradients use loss.backward() or torch.autograd.grad; of a DTensor pass "
            "to_local() or full_tensor(), of an AsyncCollectiveTensor wait())",
        )
    forward = sys.modules["torch"].autograd.forward_ad
    if getattr(forward, "_current_level", -1) >= 0 and forward.unpack_dual(tensor).tangent is not None:
        raise InvalidInput(
            field,
            "got a tensor with a tangent (forward-mode differentiation), which this loss does not support; expected a "
            "plain tensor (use loss.backward() or torch.autograd.grad)",
        )
