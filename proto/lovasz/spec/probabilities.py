"""Warns, once in a process, of logits that look like probabilities: the loss would take their softmax again."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from lovasz.spec.losses import LovaszSoftmax
from lovasz.spec.terms import WeightedSum

LOOKS = 3
"""The number of calls whose logits are looked at, the first of the process; later ones cost nothing."""
_PIXELS = 256
"""The most pixels that are looked at."""
_FEWEST_PIXELS = 32
"""Fewer pixels may look like probabilities by chance."""
_MOST_CLASSES = 1024
_TOLERANCE = 0.01
"""How far a sum over the classes may be from 1; probabilities of 16 bits are rounded."""


class Looks:
    """The looks that are left in a process.

    Attributes:
        left: their number; 0 after a warning.
    """

    def __init__(self) -> None:
        self.left = LOOKS

    def warn_of_probabilities(self, logits: Any, loss: WeightedSum) -> None:
        """Warns if the loss takes the softmax of logits that look like probabilities.

        Args:
            logits: an array of NumPy or a tensor of torch, (N, C, *spatial). It waits for a GPU in the first call only.
        """
        if self.left <= 0 or not _takes_softmax(loss):
            return
        is_first = self.left == LOOKS
        self.left -= 1
        if logits.shape[1] > _MOST_CLASSES or (getattr(logits, "is_cuda", False) and not is_first):
            return
        if _are_probabilities(_sample(logits)):
            self.left = 0
            warnings.warn(
                "logits: they look like probabilities (all are in [0, 1] and sum to 1 over the classes), and "
                "LovaszSoftmax takes their softmax again; pass the scores before the softmax, or set "
                'input="probabilities"',
                stacklevel=_level_of_caller(),
            )


LOOKS_OF_PROCESS = Looks()


def _level_of_caller() -> int:
    """The ``stacklevel`` of the innermost frame that is neither here nor in torch: the line that called the loss."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("lovasz", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def _takes_softmax(loss: WeightedSum) -> bool:
    return not loss.probabilities and any(isinstance(term, LovaszSoftmax) for _, term in loss.terms)


def _sample(logits: Any) -> npt.NDArray[Any]:
    """Some of the pixels, (n, C, ...): points, or a row or a square of the first image."""
    spatial = len(logits.shape) - 2
    sides: list[int] = [_PIXELS] if spatial == 1 else [1] * (spatial - 2) + [round(_PIXELS**0.5)] * min(spatial, 2)
    part = (slice(1 if spatial else _PIXELS), slice(None), *(slice(side) for side in sides))
    sample = logits[part]
    values: npt.NDArray[Any] = sample if isinstance(sample, np.ndarray) else sample.detach().float().cpu().numpy()
    return values


def _are_probabilities(sample: npt.NDArray[Any]) -> bool:
    if sample.size < _FEWEST_PIXELS * sample.shape[1] or not ((sample >= 0) & (sample <= 1)).all():
        return False
    return bool((np.abs(sample.sum(1, dtype=np.float64) - 1) <= _TOLERANCE).all())
