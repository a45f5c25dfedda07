"""Softmax and the way back through it, without cancellation and with the same bits wherever a pixel stands.

torch's own softmax and its sums over classes may round a pixel differently in another place of the tensor (its vector
and scalar loops differ). Here every step is an elementwise operation, and sums over classes follow a fixed tree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def sum_over_classes(values: Tensor) -> Tensor:
    """Sums (K, P) to (P,) by a tree that depends on K alone."""
    if len(values) == 1:
        return values[0].clone()
    half = len(values) // 2
    sums = values[:half] + values[half : 2 * half]
    if len(values) % 2:
        sums[0] += values[-1]
    while len(sums) > 1:
        half = len(sums) // 2
        odd = len(sums) % 2
        sums[:half] += sums[half : 2 * half]
        if odd:
            sums[0] += sums[-1]
        sums = sums[:half]
    return sums[0]


@dataclass(frozen=True)
class Softmax:
    """What the losses need of a softmax (or of probabilities that came as such).

    Attributes:
        errors: shape (K, P): the probability of each class, but on the label's class one minus it, which is taken as
            the sum of the other classes' probabilities.
        label_error: shape (P,): the errors on the label's class.
        label_probability: shape (P,): the probability of the label's class.
        negative_log: shape (P,): -log of that probability.
        log_total: shape (P,): log of the sum of the shifted exponentials: -log p_k = log_total - shifted logit k.
        maximum: shape (P,): by how much logits were shifted.
        prediction: int64, shape (P,): the arg-max, the first of equals.
        finite: bool, shape (P,): whether the pixel's logits are below infinity, and that of its label is finite.
        masked: bool, shape (P,): whether one of them is minus infinity.
    """

    errors: Tensor
    label_error: Tensor
    label_probability: Tensor
    negative_log: Tensor
    log_total: Tensor
    maximum: Tensor
    prediction: Tensor
    finite: Tensor
    masked: Tensor


def softmax(logits: Tensor, labels: Tensor) -> Softmax:
    """Args:
    logits: shape (K, P); left as it is.
    labels: int64, shape (P,), in [0, K).
    """
    index = labels.unsqueeze(0)
    maximum, prediction = logits.max(dim=0)
    finite = torch.isfinite(maximum) & (logits.gather(0, index)[0] > -torch.inf)
    masked = logits.amin(dim=0) == -torch.inf
    shifted = logits - maximum
    label_shifted = shifted.gather(0, index)[0]
    errors = shifted.exp_()
    label_exponential = errors.gather(0, index)[0]
    # Not others + label_exponential, whose last bit depends on the label: equal logits have to give equal errors.
    total = sum_over_classes(errors)
    others = sum_over_classes(errors.scatter_(0, index, 0))
    label_error = others / total
    errors.div_(total).scatter_(0, index, label_error.unsqueeze(0))
    log_total = total.log()
    # Near p = 1, log1p keeps the digits that the difference of log_total and label_shifted loses.
    likely = label_exponential > others
    negative_log = torch.where(likely, torch.log1p(others / label_exponential), log_total - label_shifted)
    label_probability = label_exponential / total
    return Softmax(errors, label_error, label_probability, negative_log, log_total, maximum, prediction, finite, masked)


def given_probabilities(probabilities: Tensor, labels: Tensor) -> Softmax:
    """The same for probabilities that are the input; they need not add up to 1, so the label's error is 1 - p."""
    index = labels.unsqueeze(0)
    maximum, prediction = probabilities.max(dim=0)
    finite = torch.isfinite(maximum) & torch.isfinite(probabilities.amin(dim=0))
    label_probability = probabilities.gather(0, index)[0]
    label_error = 1 - label_probability
    errors = probabilities.scatter(0, index, label_error.unsqueeze(0)).add_(0.0)  # -0.0 becomes 0.0, with which it ties
    unused = torch.empty(0)
    return Softmax(errors, label_error, label_probability, unused, unused, maximum, prediction, finite, unused)


def backward(softmax: Softmax, labels: Tensor, g: Tensor, pull: Tensor | None) -> Tensor:
    """dloss/dlogits of sum_k errors_k g_k (+ cross-entropy), in the memory of ``g``.

    With h_k = dloss/dp_k = g_k, and -g_y on the label's class y: dloss/dz_k = p_k (h_k - sum_j p_j h_j). On the label's
    class, 1 - p_y is the sum of the others, so nothing cancels (docs/mathematics.md).

    Args:
        labels: int64, shape (P,), in [0, K).
        g: shape (K, P), overwritten: weights x gradient of the Lovász extension.
        pull: shape (P,): cross-entropy's weight at each pixel: adds pull x (p_k - [k = y]); None for 0.
    """
    index = labels.unsqueeze(0)
    label_g = g.gather(0, index)[0]
    others = sum_over_classes((softmax.errors * g).scatter_(0, index, 0))
    shift = softmax.label_probability * label_g - others
    label_grad = -softmax.label_probability * (label_g * softmax.label_error + others)
    if pull is not None:
        shift += pull
        label_grad -= pull * softmax.label_error
    return g.add_(shift).mul_(softmax.errors).scatter_(0, index, label_grad.unsqueeze(0))
