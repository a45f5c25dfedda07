"""Which segments a term scores, and with which weight: the same for all backends.

A segment is one class (for binary losses, one label) over the pixels of one group.
"""

from __future__ import annotations

import enum
from typing import Any

from lovasz.core.plan import Term
from lovasz.spec import LovaszSoftmax


class State(enum.IntEnum):
    """How a term treats a segment."""

    PASSED_OVER = 0
    """The segment is not scored."""
    SCORED = 1
    """The segment is scored and has foreground."""
    ABSENT = 2
    """The segment is scored without foreground, so its loss is its largest error."""


def segment_factors(term: Term, share: Any, class_weights: Any) -> Any:
    """The weight of each segment, apart from the number of classes that a softmax loss scores in its group.

    Args:
        share: float64, shape (groups,): ``Groups.share``.
        class_weights: ``Term.class_weights``; it and ``share`` are NumPy arrays, or tensors on one device.

    Returns:
        float64, shape (K, groups).
    """
    weight = term.weight if isinstance(term.loss, LovaszSoftmax) else term.weight / len(class_weights)
    return weight * share * class_weights[:, None] + 0.0  # No -0.0: gradients that are written, not added, would be it.


def select_segments(term: Term, counts: Any, factors: Any, listed: Any) -> tuple[Any, Any]:
    """Decides which segments a term scores, and by what their gradients are multiplied.

    The arrays are all NumPy arrays, or all tensors on one device.

    Args:
        counts: int64, shape (K, groups): valid pixels of each class (softmax), or of each label (binary losses).
        factors: the result of ``segment_factors``.
        listed: ``Term.listed``.

    Returns:
        (scored, weights): bool and float64, shape (K, groups).
    """
    scored = counts > 0
    if not isinstance(term.loss, LovaszSoftmax):
        return scored, factors
    if listed is not None:
        scored = scored.any(0) & listed[:, None]
    classes = scored.sum(0)
    return scored, factors * scored / (classes + (classes == 0))
