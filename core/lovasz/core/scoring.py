"""Which segments a term scores, and with what weight: the same for all backends.

A segment is one class (a binary label) over the pixels of one group.
"""

from __future__ import annotations

import enum
from typing import Any

from lovasz.core.plan import Term
from lovasz.spec import LovaszHinge


class State(enum.IntEnum):
    """What becomes of a segment."""

    PASSED_OVER = 0
    SCORED = 1
    ABSENT = 2
    """It is scored without foreground: its loss is its largest error."""


def select_segments(term: Term, counts: Any, share: Any, class_weights: Any, listed: Any) -> tuple[Any, Any]:
    """Says which segments a term scores, and what their gradients are multiplied with.

    All arrays are NumPy's, or all are tensors on one device.

    Args:
        counts: int64, shape (K, groups): softmax: valid pixels of each class; hinge: valid pixels of each label.
        share: float64, shape (groups,): ``Groups.share``.
        class_weights: ``Term.class_weights``.
        listed: ``Term.listed``.

    Returns:
        (scored, weights): bool and float64, shape (K, groups).
    """
    scored = counts > 0
    if isinstance(term.loss, LovaszHinge):
        return scored, term.weight / len(counts) * share * (counts >= 0)
    if listed is not None:
        scored = scored.any(0) & listed[:, None]
    return scored, term.weight * share * class_weights[:, None] * scored / scored.sum(0).clip(1)
