"""The path of torch alone: any device, float64 too. Segments are sorted; no step waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from lovasz.core.backends.torch.cross_entropy import Part, cross_entropy
from lovasz.core.backends.torch.segments import Groups, lovasz_extension, on_device
from lovasz.core.backends.torch.softmax import Softmax, backward, given_probabilities, softmax, sum_over_classes
from lovasz.core.batch import Batch, Ragged, flatten, unflatten
from lovasz.core.computed import PROBABILITY_TOLERANCE, Computed, TermTensors, later, score
from lovasz.spec import CrossEntropy, LovaszHinge, LovaszSoftmax, WeightedSum


def compute(batch: Batch, loss: WeightedSum, device: torch.device, *, want_grad: bool) -> Computed:
    """Queues the computation of a batch."""
    with torch.no_grad():
        flat = flatten(batch, loss, device)
        terms, grad, intersection, union, faults = (_hinge if loss.is_hinge else _softmax)(flat, loss, want_grad)
        grads = None if grad is None else unflatten(grad, batch)
    return Computed(grads, later(terms, intersection, union, faults))


_Computed = tuple[tuple[TermTensors, ...], Tensor | None, Tensor, Tensor, Tensor]


class _Validity:
    """Which pixels each term counts."""

    def __init__(self, batch: Ragged, loss: WeightedSum) -> None:
        labels = batch.labels
        in_range = (labels >= 0) & (labels < batch.source.requests[0].layout.label_values)
        self.safe_labels = torch.where(in_range, labels, 0)
        self.any_ignored = any(term.ignore_index is not None for _, term in loss.terms)
        self._of: dict[int | None, Tensor] = {}
        self.bad = torch.zeros_like(in_range)
        for _, term in loss.terms:
            ignored = labels == term.ignore_index if term.ignore_index is not None else torch.zeros_like(in_range)
            self._of[term.ignore_index] = in_range & ~ignored
            self.bad |= ~in_range & ~ignored
        self.counted = torch.stack(list(self._of.values())).any(0)

    def of(self, loss: LovaszSoftmax | LovaszHinge | CrossEntropy) -> Tensor:
        return self._of[loss.ignore_index]


def _softmax(batch: Ragged, loss: WeightedSum, want_grad: bool) -> _Computed:
    validity = _Validity(batch, loss)
    labels = validity.safe_labels
    soft = given_probabilities(batch.logits, labels) if loss.probabilities else softmax(batch.logits, labels)
    g = torch.zeros_like(batch.logits) if want_grad else None
    terms: list[TermTensors] = []
    parts: list[Part] = []
    for weight, term in loss.terms:
        if isinstance(term, LovaszSoftmax):
            terms.append(_lovasz_softmax(term, weight, batch, soft, validity, g))
        elif isinstance(term, CrossEntropy):
            valid = validity.of(term)
            counts = _class_counts(labels, valid, batch.joints, len(batch.logits))
            parts.append(cross_entropy(term, weight, batch, soft, labels, valid, counts))
            values = parts[-1].loss.unsqueeze(0)
            terms.append(TermTensors(values, torch.ones_like(values, dtype=torch.bool), per_image=False))
    grad = None
    if g is not None:
        if loss.probabilities:
            grad = g.scatter_(0, labels.unsqueeze(0), -g.gather(0, labels.unsqueeze(0)))
        else:
            pull = torch.stack([part.pull for part in parts]) if parts else None
            grad = backward(soft, labels, g, None if pull is None else sum_over_classes(pull))
            for part in parts:
                part.add_spread(grad, soft, labels)
        if validity.any_ignored:
            grad.masked_fill_(~validity.counted, 0)
    hit = validity.counted & (soft.prediction == labels)
    channels = len(batch.logits)
    intersection = _class_counts(labels, hit, batch.joints, channels)
    union = _class_counts(labels, validity.counted, batch.joints, channels)
    union += _class_counts(soft.prediction, validity.counted, batch.joints, channels)
    union -= intersection
    return tuple(terms), grad, intersection, union, _faults(batch, loss, validity, soft)


def _lovasz_softmax(
    term: LovaszSoftmax, weight: float, batch: Ragged, soft: Softmax, validity: _Validity, g: Tensor | None
) -> TermTensors:
    labels, valid = validity.safe_labels, validity.of(term)
    groups, share = _groups(batch, term.per_image)
    channels = len(batch.logits)
    counts = _class_counts(labels, valid, groups, channels)
    scored, weights = score(term, weight, counts, share)
    class_numbers = torch.arange(channels, device=labels.device).unsqueeze(1)
    # Knowing which classes are present spares the CPU the sorting of the others; a GPU would have to be waited for.
    rows = None if labels.is_cuda else scored.any(1).nonzero()[:, 0].tolist()
    losses = lovasz_extension(
        soft.errors,
        lambda block: labels == class_numbers[block],
        valid,
        counts,
        groups,
        weights.to(soft.errors.dtype),
        g,
        rows=rows,
        largest_error=1.0 + PROBABILITY_TOLERANCE,
    )
    return TermTensors(losses, scored, term.per_image)


def _hinge(batch: Ragged, loss: WeightedSum, want_grad: bool) -> _Computed:
    validity = _Validity(batch, loss)
    logits, foreground = batch.logits, validity.safe_labels == 1
    errors = torch.where(foreground, 1 - logits, 1 + logits).clamp_(min=0)
    g = torch.zeros_like(logits) if want_grad else None
    terms: list[TermTensors] = []
    for weight, term in loss.terms:
        valid = validity.of(term)
        groups, share = _groups(batch, _per_image(term))
        counts = groups.sum(foreground & valid)
        assert isinstance(term, LovaszHinge)
        scored, weights = score(term, weight, groups.sum(valid), share)
        losses = lovasz_extension(errors, foreground.__getitem__, valid, counts, groups, weights.to(logits.dtype), g)
        terms.append(TermTensors(losses, scored, _per_image(term)))
    grad = None if g is None else torch.where(foreground, -g, g).mul_(errors > 0)
    if grad is not None and validity.any_ignored:
        grad.masked_fill_(~validity.counted, 0)
    predicted = logits > 0
    intersection = batch.joints.sum(predicted & foreground & validity.counted)
    union = batch.joints.sum((predicted | foreground) & validity.counted)
    return tuple(terms), grad, intersection, union, _faults(batch, loss, validity, None)


def _per_image(loss: LovaszSoftmax | LovaszHinge | CrossEntropy) -> bool:
    return not isinstance(loss, CrossEntropy) and loss.per_image


def _groups(batch: Ragged, per_image: bool) -> tuple[Groups, Tensor]:
    """The groups that are scored, and each one's share of its joint's loss (float64, one a group)."""
    if not per_image:
        return batch.joints, torch.ones(len(batch.joints), dtype=torch.float64, device=batch.logits.device)
    shares = [1 / images for images in batch.source.images for _ in range(images)]
    return batch.images, on_device(shares, torch.float64, batch.logits.device)


def _class_counts(classes: Tensor, counted: Tensor, groups: Groups, channels: int) -> Tensor:
    """int64, shape (K, groups): pixels of each class among those counted."""
    counts = torch.zeros(channels * len(groups), dtype=torch.int64, device=classes.device)
    index = classes if len(groups) == 1 else classes * len(groups) + groups.of_pixel
    return counts.scatter_add_(0, index, counted.to(torch.int64)).view(channels, len(groups))


def _faults(batch: Ragged, loss: WeightedSum, validity: _Validity, soft: Softmax | None) -> Tensor:
    finite = torch.isfinite(batch.logits) if soft is None else soft.finite
    faults = [validity.bad, ~finite & validity.counted]
    if loss.probabilities:
        low, high = -PROBABILITY_TOLERANCE, 1 + PROBABILITY_TOLERANCE
        faults.append(((batch.logits < low) | (batch.logits > high)).any(0) & finite & validity.counted)
    else:
        faults.append(torch.zeros_like(validity.bad))
    return torch.stack([batch.joints.sum(fault.reshape(-1, fault.shape[-1])).sum(0) for fault in faults])
