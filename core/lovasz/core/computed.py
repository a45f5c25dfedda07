"""What a backend gives back for a batch."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

PROBABILITY_TOLERANCE = 1e-3
"""A probability may be this far outside [0, 1]; one that is further out is an error."""

FIXED_POINT_BITS = 60
"""Sums over pixels are sums of integers: each term is rounded to a multiple of 2^-60 of a bound on the sum."""


class Fault(enum.IntEnum):
    """Why a joint cannot be computed: the rows of ``Values.faults``."""

    BAD_LABEL = 0
    NOT_FINITE = 1
    OUT_OF_RANGE = 2


@dataclass(frozen=True)
class TermValues:
    """The values of one term; the groups of a joint are consecutive.

    Attributes:
        losses: float64, shape (K, groups): before weights; cross-entropy: (1, joints).
        scored: bool, shape (K, groups).
    """

    losses: npt.NDArray[np.float64]
    scored: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Values:
    """All results of a batch but its gradients, on the host.

    Attributes:
        terms: one for each term of the loss.
        labels: int64, shape (K, joints): counted pixels of each class (hinge: whose label is 1).
        predictions: int64, shape (K, joints): counted pixels that are predicted as each class.
        hits: int64, shape (K, joints): those of them that are predicted right.
        faults: int64, shape (3, joints): by ``Fault``, how many pixels have it. All other values of a joint with a
            fault are undefined.
    """

    terms: tuple[TermValues, ...]
    labels: npt.NDArray[np.int64]
    predictions: npt.NDArray[np.int64]
    hits: npt.NDArray[np.int64]
    faults: npt.NDArray[np.int64]

    @property
    def union(self) -> npt.NDArray[np.int64]:
        """int64, shape (K, joints): pixels that have the class as their label or as their prediction."""
        return self.labels + self.predictions - self.hits


@dataclass(frozen=True)
class Computed:
    """What a backend has computed, or has queued on its device.

    Attributes:
        grads: one contiguous tensor a request, in the shape of its logits; None if no gradient was wanted. float32,
            or float64 for float64 logits.
        values: waits for the device and reads the values.
        total: of a batch of one request: waits only until its faults are known; its loss as a tensor of no axis, which
            may still be being computed, or None if it has a fault. None if it was not asked for, or if the backend does
            not offer it.
    """

    grads: tuple[Tensor, ...] | None
    values: Callable[[], Values]
    total: Callable[[], Tensor | None] | None = None
