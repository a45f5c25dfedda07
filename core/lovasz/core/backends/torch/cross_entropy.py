"""Softmax cross-entropy with class weights, ``ignore_index`` and label smoothing, defined as in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lovasz.core.backends.torch.flat import Flat
from lovasz.core.backends.torch.segments import exact_sum, on_device
from lovasz.core.backends.torch.softmax import Softmax, sum_over_classes
from lovasz.core.plan import Term


@dataclass(frozen=True)
class Part:
    """The loss of a cross-entropy term, and the factors of its gradient.

    The gradient with respect to logit k is

        pull x (p_k - [k = y]) + spread x (sum of class weights x p_k - weight_k).

    Attributes:
        loss: float64, shape (joints,).
        pull: shape (P,).
        spread: shape (P,); None without label smoothing.
        class_weights: shape (K,).
    """

    loss: Tensor
    pull: Tensor
    spread: Tensor | None
    class_weights: Tensor

    def add_spread(self, grad: Tensor, softmax: Softmax, labels: Tensor) -> None:
        """Adds the summand with ``spread``, from label smoothing, to ``grad``, shape (K, P)."""
        if self.spread is None:
            return
        total = sum_over_classes(self.class_weights.unsqueeze(1))
        probabilities = softmax.errors.scatter(0, labels.unsqueeze(0), softmax.label_probability.unsqueeze(0))
        grad += probabilities.mul_(total).sub_(self.class_weights.unsqueeze(1)).mul_(self.spread)


def cross_entropy(term: Term, flat: Flat, softmax: Softmax, labels: Tensor, valid: Tensor, counts: Tensor) -> Part:
    """Computes the loss of a term and the factors of its gradient.

    Args:
        labels: int64, shape (P,), in [0, K).
        valid: bool, shape (P,): pixels that are not void for this term.
        counts: int64, shape (K, joints): valid pixels of each class.
    """
    joints, dtype, smoothing = flat.joints, flat.logits.dtype, term.label_smoothing
    class_weights = on_device(term.class_weights, labels.device)
    total_weight = sum_over_classes(counts.to(torch.float64) * class_weights.unsqueeze(1))
    scale = torch.where(total_weight > 0, 1 / total_weight, 0)
    class_weights = class_weights.to(dtype)
    pixel_weight = torch.where(valid, class_weights[labels], 0)
    pixel_loss = torch.where(valid, softmax.negative_log, 0) * pixel_weight
    spread = None
    if smoothing > 0:
        shifted = (flat.logits - softmax.maximum).mul_(class_weights.unsqueeze(1))
        all_classes = sum_over_classes(class_weights.unsqueeze(1)) * softmax.log_total - sum_over_classes(shifted)
        share = smoothing / len(class_weights)
        pixel_loss = (1 - smoothing) * pixel_loss + share * torch.where(valid, all_classes, 0)
        spread = torch.where(valid, joints.at_pixels((term.spread_factor * scale).to(dtype)), 0)
    # A joint's sum is at most its largest pixel loss times the number of its pixels.
    exponent = torch.frexp(joints.max(pixel_loss).to(torch.float64) * joints.sizes).exponent
    value = exact_sum(pixel_loss.to(torch.float64).unsqueeze(0), joints, exponent)[0] * scale
    pull = pixel_weight * joints.at_pixels((term.label_factor * scale).to(dtype))
    return Part(value, pull, spread, class_weights)
