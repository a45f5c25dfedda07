"""What a rank tells the others before it sends pixels: its settings and sizes, its fault, or that it has left."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch

from lovasz.core.batch import FLOAT_TYPES, INTEGER_TYPES, Request
from lovasz.core.distributed.group import Group
from lovasz.spec import GradientReduction, InvalidInput, WeightedSum
from lovasz.spec.layout import MAX_AXES
from lovasz.version import VERSION

_NO_OFFSETS = -1
_SETTINGS = ("loss", "logits", "channels", "gradient", "gradient_reduction", "backend", "lovasz")
"""What all ranks must have in common, as ``settings`` describes it."""

_SIZES = 3 + 2 * (1 + MAX_AXES)


class _Status(IntEnum):
    """How a rank takes part in a step."""

    READY = 0
    FAULT = 1
    LEFT = 2


@dataclass(frozen=True)
class Sizes:
    """What is needed to read a rank's tensors.

    Attributes:
        logits_dtype: the element type of the logits.
        labels_dtype: the element type of the labels as they are sent.
        logits: the shape of the logits.
        labels: the shape of the labels.
        offsets: the number of ``Layout.offsets``; None if there are none.
    """

    logits_dtype: torch.dtype
    labels_dtype: torch.dtype
    logits: tuple[int, ...]
    labels: tuple[int, ...]
    offsets: int | None

    @classmethod
    def of(cls, request: Request, labels_dtype: torch.dtype) -> Sizes:
        offsets = request.layout.offsets
        return cls(
            request.logits.dtype,
            labels_dtype,
            tuple(request.logits.shape),
            tuple(request.labels.shape),
            None if offsets is None else len(offsets),
        )

    def encoded(self) -> npt.NDArray[np.int64]:
        numbers = np.zeros(_SIZES, np.int64)
        numbers[0] = FLOAT_TYPES.index(self.logits_dtype)
        numbers[1] = INTEGER_TYPES.index(self.labels_dtype)
        numbers[2] = _NO_OFFSETS if self.offsets is None else self.offsets
        for start, shape in ((3, self.logits), (4 + MAX_AXES, self.labels)):
            numbers[start] = len(shape)
            numbers[start + 1 : start + 1 + len(shape)] = shape
        return numbers

    @classmethod
    def decoded(cls, numbers: npt.NDArray[np.int64]) -> Sizes:
        return cls(
            FLOAT_TYPES[int(numbers[0])],
            INTEGER_TYPES[int(numbers[1])],
            _shape(numbers[3:]),
            _shape(numbers[4 + MAX_AXES :]),
            None if numbers[2] == _NO_OFFSETS else int(numbers[2]),
        )


def _shape(numbers: npt.NDArray[np.int64]) -> tuple[int, ...]:
    """A shape from the number of its axes and their sizes."""
    return tuple(numbers[1 : 1 + int(numbers[0])].tolist())


def settings(
    request: Request, loss: WeightedSum, want_grad: bool, gradient_reduction: GradientReduction, backend: str
) -> tuple[str, ...]:
    """What all ranks must have in common, in the order of ``_SETTINGS``."""
    terms = ", ".join(f"{weight} * {term}" for weight, term in loss.terms)  # All digits of the weight.
    dtype = str(request.logits.dtype).removeprefix("torch.")
    return (
        terms,
        f"element type {dtype}",
        f"{request.layout.channels}",
        "with a gradient" if want_grad else "without a gradient",
        f"{gradient_reduction!r}" if want_grad else "no gradient",
        f"{backend} on {request.logits.device.type}",
        f"version {VERSION}",
    )


@dataclass(frozen=True)
class _Headers:
    """What all ranks have told, row by row; sizes and digests count only where a rank is ready."""

    statuses: npt.NDArray[np.int64]
    digests: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    @property
    def have_fault(self) -> bool:
        return bool((self.statuses == _Status.FAULT).any())

    @property
    def differ(self) -> bool:
        digests = self.digests[self.statuses == _Status.READY]
        return bool((digests != digests[:1]).any())

    def decoded(self) -> dict[int, Sizes]:
        return {int(rank): Sizes.decoded(self.sizes[rank]) for rank in np.flatnonzero(self.statuses == _Status.READY)}


def exchange(group: Group, own: tuple[tuple[str, ...], Sizes] | Exception) -> dict[int, Sizes]:
    """Tells all ranks of this rank's settings and sizes, or of its fault; returns the sizes of the ranks with data.

    Those are all ranks but the ones that have left; in ascending order.

    Raises:
        InvalidInput: the input of a rank is invalid, or the ranks' settings differ; on every rank, with the same text.
        RuntimeError: a rank failed for another reason; on every rank.
    """
    if isinstance(own, Exception):
        _exchanged(group, _Status.FAULT)
        raise_first(group, own)
    headers = _exchanged(group, _Status.READY, own)
    if headers.have_fault:
        raise_first(group, None)
    if headers.differ:
        _raise_difference(group.objects(own[0]))
    return headers.decoded()


def exchange_without_data(group: Group) -> dict[int, Sizes] | None:
    """Takes part in ``exchange`` as a rank that has left; returns None if the step fails on the other ranks."""
    headers = _exchanged(group, _Status.LEFT)
    if headers.have_fault or headers.differ:
        group.objects(None)
        return None
    return headers.decoded()


def _exchanged(group: Group, status: _Status, own: tuple[tuple[str, ...], Sizes] | None = None) -> _Headers:
    header = np.zeros(1 + len(_SETTINGS) + _SIZES, np.int64)
    header[0] = status
    if own is not None:
        header[1 : 1 + len(_SETTINGS)] = [_digest(text) for text in own[0]]
        header[1 + len(_SETTINGS) :] = own[1].encoded()
    headers = group.numbers(header)
    return _Headers(headers[:, 0], headers[:, 1 : 1 + len(_SETTINGS)], headers[:, 1 + len(_SETTINGS) :])


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _told(fault: Exception | None) -> tuple[str, str] | None:
    """A fault as (field, problem); the field is empty unless the input is at fault."""
    if fault is None:
        return None
    if isinstance(fault, InvalidInput):
        return fault.field, fault.problem
    return "", f"{type(fault).__name__}: {fault}"


def raise_first(group: Group, own: Exception | None) -> NoReturn:
    """Raises the fault of the first rank that has one, on every rank; all ranks call it, at least one with a fault."""
    told: list[tuple[str, str] | None] = group.objects(_told(own))
    rank, (field, problem) = next((rank, fault) for rank, fault in enumerate(told) if fault is not None)
    if field:
        raise InvalidInput(f"rank {rank}: {field}", problem) from own
    raise RuntimeError(f"the joint loss failed on rank {rank}: {problem}") from own


def _raise_difference(told: Sequence[tuple[str, ...] | None]) -> None:
    """Raises the first difference in the settings of the ranks; a rank that has left has told None."""
    of_ranks = [(rank, texts) for rank, texts in enumerate(told) if texts is not None]
    first, expected = of_ranks[0]
    for place, field in enumerate(_SETTINGS):
        for rank, texts in of_ranks:
            if texts[place] != expected[place]:
                raise InvalidInput(
                    f"rank {rank}: {field}", f"got {texts[place]}; expected {expected[place]}, like rank {first}"
                )
