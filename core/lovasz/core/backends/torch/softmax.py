"""Softmax and its backward pass, without cancellation, and bit-identical wherever a pixel is in the tensor.

PyTorch's own softmax and sums over classes may round differently at another position in the tensor, as its vector and
scalar loops differ. Here every step is an elementwise operation, and sums over classes follow a fixed tree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def sum_over_classes(values: Tensor) -> Tensor:
    """Sums (K, P) over classes to (P,), by a tree that depends on K alone."""
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
    """The softmax of a batch (or the probabilities that are its input), as far as the losses need it.

    Attributes:
        errors: shape (K, P): the probability p of each class; for the label's class 1 - p, which a softmax computes as
            the sum of the other classes' probabilities.
        label_error: shape (P,): the error of the label's class.
        label_probability: shape (P,): the probability of the label's class.
        negative_log: shape (P,): -log of the probability of the label's class.
        log_total: shape (P,): log of the sum of exp(logit - maximum), so -log p_k = log_total - (logit k - maximum).
        maximum: shape (P,): the largest logit.
        prediction: int64, shape (P,): the class with the largest logit; the first one among equal logits.
        finite: bool, shape (P,): whether all its logits are below infinity, and that of its label is finite.
        masked: bool, shape (P,): whether one of its logits is minus infinity.
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
    """Computes the softmax of logits.

    Args:
        logits: shape (K, P); not modified.
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
    # Not others + label_exponential: its last bit depends on the label, but equal logits must give equal errors.
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
    """Takes the input as probabilities. They need not sum to exactly 1, so the label's error is 1 - p.

    ``negative_log`` and ``log_total`` are empty, as cross-entropy takes logits only.
    """
    index = labels.unsqueeze(0)
    maximum, prediction = probabilities.max(dim=0)
    finite = torch.isfinite(maximum) & torch.isfinite(probabilities.amin(dim=0))
    label_probability = probabilities.gather(0, index)[0]
    label_error = 1 - label_probability
    # Errors are not negative: values below 0 within the tolerance become 0, and -0.0 by the sum.
    errors = probabilities.scatter(0, index, label_error.unsqueeze(0)).clamp_(min=0).add_(0.0)
    unused = torch.empty(0)
    return Softmax(errors, label_error, label_probability, unused, unused, maximum, prediction, finite, unused)


def backward(softmax: Softmax, labels: Tensor, g: Tensor, pull: Tensor | None) -> Tensor:
    """The gradient with respect to the logits of sum_k errors_k g_k (+ cross-entropy), in the memory of ``g``.

    Let h_k = dloss/dp_k, which is -g_y for the label's class y and g_k for the others; then
    dloss/dz_k = p_k (h_k - sum_j p_j h_j). For the label's class, 1 - p_y is computed as the sum of the other
    probabilities, so nothing cancels (docs/mathematics.md, section 8).

    Args:
        labels: int64, shape (P,), in [0, K).
        g: shape (K, P), overwritten: the weighted gradient of the Lovász extension.
        pull: shape (P,): pull x (p_k - [k = y]) is cross-entropy's gradient; None without cross-entropy.
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
