"""The sigmoid of binary problems, without cancellation, and binary cross-entropy.

The margin of a pixel is its logit, with the sign changed where the label is 0: large where the logit is right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lovasz.core.backends.torch.flat import Flat
from lovasz.core.backends.torch.segments import exact_sum, on_device
from lovasz.core.plan import Term


@dataclass(frozen=True)
class Sigmoid:
    """What the losses need of the sigmoid, all of the shape of the margins z.

    Attributes:
        errors: |y - sigmoid(x)| = sigmoid(-z).
        slope: sigmoid(x) (1 - sigmoid(x)).
        correction: log(1 + exp(-|z|)), so -log(sigmoid(z)) = max(-z, 0) + correction.
    """

    errors: Tensor
    slope: Tensor
    correction: Tensor

    @classmethod
    def of(cls, margins: Tensor) -> Sigmoid:
        exponential = margins.abs().neg_().exp_()
        larger = 1 / (1 + exponential)
        smaller = exponential * larger
        return cls(torch.where(margins >= 0, smaller, larger), smaller * larger, exponential.log1p_())


def binary_cross_entropy(
    term: Term, flat: Flat, margins: Tensor, sigmoid: Sigmoid, foreground: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes the loss of a term, and its gradient with respect to minus the margins.

    Args:
        margins: z, shape (K, P).
        foreground: bool, shape (K, P): pixels whose label is 1.
        valid: bool, shape (K, P): pixels that are not void for this term.

    Returns:
        (loss, gradient): float64, shape (1, joints), and the dtype of the margins, shape (K, P).
    """
    joints = flat.joints
    pos_weight = on_device(term.pos_weight, margins.device).unsqueeze(1)
    counts = joints.sum(valid).sum(0).to(torch.float64)
    scale = torch.where(counts > 0, 1 / counts, 0)
    pixel_weight = torch.where(foreground, pos_weight, 1.0) * valid
    pixel_loss = torch.where(valid, (-margins).clamp_(min=0) + sigmoid.correction, 0).to(torch.float64) * pixel_weight
    # A joint's sum is at most its largest loss of a pixel times the number of its pixels and labels.
    exponent = torch.frexp(joints.max(pixel_loss.amax(0)) * joints.sizes * len(pixel_loss)).exponent
    loss = exact_sum(pixel_loss, joints, exponent).sum(0) * scale
    factor = pixel_weight * joints.at_pixels(term.weight * scale)
    return loss.unsqueeze(0), sigmoid.errors * factor.to(margins.dtype)
