"""The Lovász losses as the textbook defines them: the slow, readable reference that the backends are tested against.

Four steps (Berman, Triki and Blaschko, CVPR 2018, algorithm 1), for one class over the pixels of a group:

1. the errors of the pixels (:func:`softmax_errors`, :func:`hinge_errors`, :func:`sigmoid_errors`);
2. the Jaccard loss as the pixels turn wrong one after the other, largest error first (:func:`jaccard_along_order`);
3. its differences, the gradient of the Lovász extension (:func:`lovasz_grad`);
4. the dot product of errors and differences (:func:`lovasz_extension`).

Works in the dtype of its input; evaluate it in float64 for reference values. ``docs/mathematics.md`` derives all of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from lovasz.spec import (
    BinaryCrossEntropy,
    BinaryLoss,
    CrossEntropy,
    InvalidInput,
    Layout,
    Loss,
    LossLike,
    LovaszHinge,
    LovaszLoss,
    LovaszSigmoid,
    LovaszSoftmax,
    weighted_sum,
)


def softmax_errors(probabilities: Tensor, foreground: Tensor) -> Tensor:
    """m_i = 1 - f_i(c) where c is the label, f_i(c) elsewhere.

    Args:
        probabilities: f(c), the probability of one class c at each pixel, shape (P,).
        foreground: bool, shape (P,): whether c is the pixel's label.
    """
    return torch.where(foreground, 1 - probabilities, probabilities)


def hinge_errors(logits: Tensor, foreground: Tensor) -> Tensor:
    """m_i = 1 - s_i x_i with the sign s_i = +1 for foreground, -1 for background; only m_i > 0 counts.

    Args:
        logits: the score x of the foreground at each pixel, shape (P,).
        foreground: bool, shape (P,).
    """
    signs = torch.where(foreground, 1, -1)
    return 1 - logits * signs


def sigmoid_errors(logits: Tensor, foreground: Tensor) -> Tensor:
    """m_i = sigmoid(-s_i x_i) with the sign s_i = +1 for foreground, -1 for background: |y_i - sigmoid(x_i)|.

    Args:
        logits: the score x of the foreground at each pixel, shape (P,).
        foreground: bool, shape (P,).
    """
    signs = torch.where(foreground, 1, -1)
    return torch.sigmoid(-logits * signs)


def jaccard_along_order(foreground_sorted: Tensor) -> Tensor:
    """The Jaccard loss 1 - I/U after each pixel, if the pixels turn wrong one after the other in the given order.

    A foreground pixel that turns wrong leaves the intersection; a background pixel that turns wrong joins the union.

    Args:
        foreground_sorted: 1 for foreground and 0 for background in descending order of the errors, shape (P,), P >= 1,
            in the floating-point dtype to compute with.

    Returns:
        Shape (P,), without the loss before the first pixel, which is 0.
    """
    intersection = foreground_sorted.sum() - foreground_sorted.cumsum(0)
    union = foreground_sorted.sum() + (1 - foreground_sorted).cumsum(0)
    return 1 - intersection / union


def lovasz_grad(foreground_sorted: Tensor) -> Tensor:
    """g_i = jaccard_i - jaccard_(i-1): the gradient of the Lovász extension with respect to the sorted errors.

    Args:
        foreground_sorted: as for :func:`jaccard_along_order`.

    Returns:
        Shape (P,): numbers >= 0 whose sum is 1.
    """
    return jaccard_along_order(foreground_sorted).diff(prepend=foreground_sorted.new_zeros(1))


def lovasz_extension(errors: Tensor, foreground: Tensor) -> Tensor:
    """The Lovász extension of the Jaccard loss: the sum of m_i g_i over the pixels in descending order of the errors.

    The order is piecewise constant in the errors, so g is a constant to autograd and the gradient is a subgradient.
    Among equal errors, foreground comes first, then the order of the pixels decides. The loss does not depend on this
    choice, but the gradient does.

    Args:
        errors: m, shape (P,), P >= 1; for the hinge after ``relu``.
        foreground: bool, shape (P,).

    Returns:
        A 0-dim tensor in the dtype of the errors.
    """
    order = torch.argsort(foreground.to(torch.uint8), descending=True, stable=True)
    order = order[torch.argsort(errors.detach()[order], descending=True, stable=True)]
    g = lovasz_grad(foreground[order].to(errors.dtype)).detach()
    return torch.dot(errors[order], g)


def compute(logits: Tensor, labels: Tensor, loss: LossLike) -> Tensor:
    """The loss of a batch, differentiable with respect to the logits: what every backend has to return.

    Args:
        logits: shape (N, C, *spatial), any floating-point dtype; for binary losses see
            :class:`~lovasz.spec.LovaszHinge`; probabilities if the loss has ``input="probabilities"``.
        labels: shape (N, *spatial), of an integer or bool dtype.
        loss: one loss, or a list of (weight, loss) pairs.

    Returns:
        A 0-dim tensor in the dtype of the logits; NaN, with a NaN gradient, if a logit of a valid pixel is not finite.
        Minus infinity is allowed at classes other than the label: their probability is 0.

    Raises:
        InvalidInput: shapes, options or labels do not fit together.
    """
    total = weighted_sum(loss)
    layout = total.layout(tuple(logits.shape), tuple(labels.shape))
    for _, term in total.terms:
        _check_labels(labels, term.ignore_index, layout.label_values)

    logits = logits.reshape(layout.images, layout.channels, layout.pixels)
    labels = _flat_labels(labels, layout, is_binary=total.is_binary)
    if not all(_is_finite(logits, labels, term) for _, term in total.terms):
        return (logits * math.nan).sum()
    result = _zero(logits)
    for weight, term in total.terms:
        result = result + weight * _term(logits, labels, term)
    return result


def per_class_losses(logits: Tensor, labels: Tensor, loss: LovaszLoss) -> Tensor:
    """The loss of each class (for binary losses, of each label) before class weights.

    Takes the arguments of :func:`compute`, with one Lovász loss.

    Returns:
        Shape (C,), in the dtype of the logits: the mean over the groups that score the class, NaN if no group does. A
        group without a valid pixel scores nothing.
    """
    layout = weighted_sum(loss).layout(tuple(logits.shape), tuple(labels.shape))
    _check_labels(labels, loss.ignore_index, layout.label_values)
    logits = logits.reshape(layout.images, layout.channels, layout.pixels)
    groups = _class_losses(logits, _flat_labels(labels, layout, is_binary=isinstance(loss, BinaryLoss)), loss)
    means = []
    for c in range(layout.channels):
        values = [group[c] for group in groups if c in group]
        means.append(torch.stack(values).mean() if values else logits.new_full((), math.nan))
    return torch.stack(means)


# In the functions below, logits have the shape (images, channels, pixels), and labels (images, pixels). For binary
# losses each channel is a problem with its own labels, so labels have the shape (images, channels, pixels).


def _term(logits: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    if isinstance(loss, CrossEntropy):
        return _cross_entropy(logits, labels, loss)
    if isinstance(loss, BinaryCrossEntropy):
        return _binary_cross_entropy(logits, labels, loss)
    if not isinstance(loss, LovaszLoss):
        raise NotImplementedError(type(loss).__name__)
    groups = _class_losses(logits, labels, loss)
    result = _zero(logits)
    for losses in groups:
        weights = loss.class_weights if isinstance(loss, LovaszSoftmax) else None
        weighted = [value if weights is None else weights[c] * value for c, value in losses.items()]
        # The mean is over all labels of a binary loss (one whose pixels are all void adds 0), but only over the classes
        # of the softmax that the group scores.
        scored = logits.shape[1] if isinstance(loss, BinaryLoss) else len(losses)
        if weighted:
            result = result + torch.stack(weighted).sum() / scored
    return result / len(groups)


def _class_losses(logits: Tensor, labels: Tensor, loss: LovaszLoss) -> list[dict[int, Tensor]]:
    """The loss of each scored class, by class, for each group."""
    images_per_group = 1 if loss.per_image else len(logits)
    groups = zip(torch.split(logits, images_per_group), torch.split(labels, images_per_group), strict=True)
    if isinstance(loss, LovaszSoftmax):
        return [_softmax_group(*group, loss) for group in groups]
    return [_binary_group(*group, loss) for group in groups]


def _softmax_group(logits: Tensor, labels: Tensor, loss: LovaszSoftmax) -> dict[int, Tensor]:
    counted = _counted(labels, loss.ignore_index)
    labels = labels[counted]
    pixels = logits.movedim(1, -1)[counted]  # (P, C), ordered by image, then by raster
    probabilities = pixels if loss.input == "probabilities" else pixels.softmax(dim=1)
    losses = {}
    for c in _scored_classes(labels, logits.shape[1], loss):
        foreground = labels == c
        losses[c] = lovasz_extension(softmax_errors(probabilities[:, c], foreground), foreground)
    return losses


def _scored_classes(labels: Tensor, classes: int, loss: LovaszSoftmax) -> list[int]:
    if labels.numel() == 0:
        return []
    if loss.classes == "present":
        return [c for c in range(classes) if (labels == c).any()]
    if loss.classes == "all":
        return list(range(classes))
    return [int(c) for c in loss.classes]


def _binary_group(logits: Tensor, labels: Tensor, loss: LovaszHinge | LovaszSigmoid) -> dict[int, Tensor]:
    errors_of = sigmoid_errors if isinstance(loss, LovaszSigmoid) else hinge_errors
    losses = {}
    for c in range(logits.shape[1]):
        counted = _counted(labels[:, c], loss.ignore_index)
        if counted.any():
            foreground = labels[:, c][counted] == 1
            errors = errors_of(logits[:, c][counted], foreground)
            losses[c] = lovasz_extension(errors.relu(), foreground)
    return losses


def _cross_entropy(logits: Tensor, labels: Tensor, loss: CrossEntropy) -> Tensor:
    counted = _counted(labels, loss.ignore_index)
    labels = labels[counted]
    weights = None if loss.class_weights is None else logits.new_tensor(loss.class_weights)
    divisor = labels.numel() if weights is None else float(weights[labels].sum())
    if divisor == 0:
        return _zero(logits)
    pixels = logits.movedim(1, -1)[counted]
    return cross_entropy(pixels, labels, weight=weights, label_smoothing=loss.label_smoothing)


def _binary_cross_entropy(logits: Tensor, labels: Tensor, loss: BinaryCrossEntropy) -> Tensor:
    counted = _counted(labels, loss.ignore_index)
    if not counted.any():
        return _zero(logits)
    weights = torch.ones(logits.shape[1], dtype=logits.dtype, device=logits.device)
    if loss.pos_weight is not None:
        weights = weights * logits.new_tensor(loss.pos_weight)
    weights = weights[:, None].expand(logits.shape)[counted]
    # BCEWithLogitsLoss gives NaN for a masked pixel, as minus infinity times its label is NaN. So it is left out here.
    masked = logits[counted] == -math.inf
    values = torch.where(masked, 0, logits[counted])
    losses = binary_cross_entropy_with_logits(values, labels[counted].to(logits), pos_weight=weights, reduction="none")
    return torch.where(masked, 0, losses).mean()


def _zero(logits: Tensor) -> Tensor:
    """A zero with a zero gradient, even if a void pixel's logit is not finite: the sum of no logits."""
    return logits[:0].sum()


def _counted(labels: Tensor, ignore_index: int | None) -> Tensor:
    if ignore_index is None:
        return torch.ones_like(labels, dtype=torch.bool)
    return labels != ignore_index


def _is_finite(logits: Tensor, labels: Tensor, loss: Loss) -> bool:
    """Whether all errors and losses of counted pixels are finite.

    Minus infinity masks a class that is not the pixel's: its probability is 0. (Label smoothing has no such class.)
    """
    counted = _counted(labels, loss.ignore_index)
    if isinstance(loss, BinaryLoss):
        errors = hinge_errors(logits[counted], labels[counted] == 1).relu()
        return bool((logits[counted] < math.inf).all() and (errors < math.inf).all())
    pixels, own = logits.movedim(1, -1)[counted], labels[counted]
    needed = pixels.gather(1, own.unsqueeze(1))
    if (isinstance(loss, CrossEntropy) and loss.label_smoothing > 0) or _reads_probabilities(loss):
        needed = pixels
    return bool((pixels < math.inf).all() and (needed > -math.inf).all())


def _reads_probabilities(loss: Loss) -> bool:
    return isinstance(loss, LovaszSoftmax) and loss.input == "probabilities"


def _flat_labels(labels: Tensor, layout: Layout, *, is_binary: bool) -> Tensor:
    if is_binary:
        return labels.long().reshape(layout.images, layout.channels, layout.pixels)
    return labels.long().reshape(layout.images, layout.pixels)


def _check_labels(labels: Tensor, ignore_index: int | None, values: int) -> None:
    if labels.is_floating_point() or labels.is_complex():
        raise InvalidInput("labels", f"got dtype {labels.dtype}; expected integers")
    labels = labels.long()
    wrong = _counted(labels, ignore_index) & ((labels < 0) | (labels >= values))
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        besides = "" if ignore_index is None else f" or ignore_index={ignore_index}"
        raise InvalidInput("labels", f"got {int(labels[where])} at {where}; expected values in [0, {values}){besides}")


__all__ = [
    "compute",
    "hinge_errors",
    "jaccard_along_order",
    "lovasz_extension",
    "lovasz_grad",
    "per_class_losses",
    "sigmoid_errors",
    "softmax_errors",
]
