"""What every path hands back for a batch, and how segments are scored, which is the same on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lovasz.core.backends.torch.segments import on_device
from lovasz.spec import LovaszHinge, LovaszSoftmax

PROBABILITY_TOLERANCE = 1e-3
"""How far a probability may stand outside [0, 1]; what is further out is taken for a mistake."""


@dataclass(frozen=True)
class TermValues:
    """One term's values; of ``losses`` and ``scored``, the groups of one joint stand side by side.

    Attributes:
        losses: float64, shape (K, groups): before weights; cross-entropy: (1, joints).
        scored: bool, shape (K, groups).
        per_image: whether a group is an image; if not, it is a joint.
    """

    losses: npt.NDArray[np.float64]
    scored: npt.NDArray[np.bool_]
    per_image: bool


@dataclass(frozen=True)
class Values:
    """All that is known of a batch but its gradients, on the host.

    Attributes:
        terms: one for each term of the loss.
        intersection: int64, shape (K, joints): pixels of each class that are predicted right.
        union: int64, shape (K, joints): pixels that are of the class or predicted as it.
        faults: int64, shape (3, joints): bad labels, pixels with a logit that is not finite, pixels with a
            probability that is out of range. What else is said of a joint with a fault is meaningless.
    """

    terms: tuple[TermValues, ...]
    intersection: npt.NDArray[np.int64]
    union: npt.NDArray[np.int64]
    faults: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Computed:
    """What a path has computed, or has queued on its device.

    Attributes:
        grads: one contiguous tensor a request, in the shape of its logits; None if no gradient was wanted. float32,
            or float64 for float64 logits.
        values: waits for the device and reads the values.
        total: waits only until it is known whether a batch of one request can be computed with; its loss as a tensor
            of no axis, which may still be computed, or None if there is a fault. None if it was not asked for, or if
            the path has no such thing.
    """

    grads: tuple[Tensor, ...] | None
    values: Callable[[], Values]
    total: Callable[[], Tensor | None] | None = None


@dataclass(frozen=True)
class TermTensors:
    """:class:`TermValues` that may still be on a device."""

    losses: Tensor
    scored: Tensor
    per_image: bool


def later(terms: Sequence[TermTensors], intersection: Tensor, union: Tensor, faults: Tensor) -> Callable[[], Values]:
    """Reads :class:`Values` off tensors."""

    def read() -> Values:
        on_host = [TermValues(t.losses.cpu().numpy(), t.scored.cpu().numpy(), t.per_image) for t in terms]
        return Values(tuple(on_host), *(tensor.cpu().numpy() for tensor in (intersection, union, faults)))

    return read


def score(term: LovaszSoftmax | LovaszHinge, weight: float, counts: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Which segments a term scores, and what their gradients are multiplied with.

    Args:
        weight: the term's weight in the sum.
        counts: int64, shape (K, groups): softmax: valid pixels of each class; hinge: valid pixels of each label.
        share: float64, shape (groups,): each group's share of its joint's loss.

    Returns:
        (scored, weights): bool and float64, shape (K, groups).
    """
    channels = len(counts)
    if isinstance(term, LovaszHinge):
        return counts > 0, (weight / channels * share).expand(counts.shape)
    if term.classes == "present":
        scored = counts > 0
    else:
        scored = (counts.sum(0) > 0).expand(counts.shape)
        if term.classes != "all":
            wanted = frozenset(term.classes)
            scored = scored & on_device([c in wanted for c in range(channels)], torch.bool, counts.device).unsqueeze(1)
    class_weights = on_device(term.class_weights or [1.0] * channels, torch.float64, counts.device)
    return scored, weight * share * class_weights.unsqueeze(1) * scored / scored.sum(0).clamp(min=1)
