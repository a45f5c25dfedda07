"""What a backend returns for a batch."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

PROBABILITY_TOLERANCE = 1e-3
"""How far a probability may lie outside [0, 1] without being a fault. Errors below 0, of such, count as 0."""

FIXED_POINT_BITS = 60
"""The precision of sums over pixels. Each summand is rounded to a multiple of 2^-60 of a bound on the sum and added as
an integer, so that the sum does not depend on the order."""


class Fault(enum.IntEnum):
    """Why a joint cannot be computed; also the rows of ``Values.faults``."""

    BAD_LABEL = 0
    """A label is out of range, and some rule does not ignore it."""
    NOT_FINITE = 1
    """A logit is NaN or infinite. (Minus infinity masks a class that is not the label.)"""
    OUT_OF_RANGE = 2
    """The input is probabilities, and one lies outside [0, 1] by more than ``PROBABILITY_TOLERANCE``."""


@dataclass(frozen=True)
class TermValues:
    """The values of one term. The groups of a joint are consecutive.

    Attributes:
        losses: float64, shape (K, groups): the loss of each segment before weights; both
            cross-entropies: shape (1, joints).
        scored: bool, the same shape: whether the term scores the segment; cross-entropies: all true.
    """

    losses: npt.NDArray[np.float64]
    scored: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Values:
    """All results of a batch except the gradients, on the host.

    ``labels``, ``predictions`` and ``hits`` count the pixels that are valid for at least one rule.

    Attributes:
        terms: one for each term of the loss.
        labels: int64, shape (K, joints): pixels of each class (binary losses: pixels whose label is 1).
        predictions: int64, shape (K, joints): pixels that are predicted as each class.
        hits: int64, shape (K, joints): pixels that are predicted as each class and belong to it.
        faults: int64, shape (3, joints): the number of pixels with each ``Fault``. All other values of a joint with a
            fault are undefined.
    """

    terms: tuple[TermValues, ...]
    labels: npt.NDArray[np.int64]
    predictions: npt.NDArray[np.int64]
    hits: npt.NDArray[np.int64]
    faults: npt.NDArray[np.int64]

    @property
    def union(self) -> npt.NDArray[np.int64]:
        """The pixels with the class as label or as prediction: int64, shape (K, joints)."""
        return self.labels + self.predictions - self.hits


@dataclass(frozen=True)
class Computed:
    """What a backend has computed, or has queued on its device.

    Attributes:
        grads: one contiguous tensor per request, of the shape of its logits, float32 (float64 for float64 logits);
            None if no gradient was wanted.
        values: waits for the device and reads the values.
        total: None if the backend offers none, or if it was not asked for. Else, for a batch of one request: waits
            until its faults are known, and returns its loss as a 0-dim tensor, which the device may still compute;
            None if the request has a fault.
    """

    grads: tuple[Tensor, ...] | None
    values: Callable[[], Values]
    total: Callable[[], Tensor | None] | None = None
