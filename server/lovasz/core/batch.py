"""Computes a batch of requests at once: validity of labels, terms of the loss, gradient, and the counts for IoU.

``launch`` queues all work on the device without waiting for it; ``Launched.collect`` waits and sorts the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lovasz.core.cross_entropy import Part, cross_entropy
from lovasz.core.ragged import Ragged, Request, flatten, unflatten
from lovasz.core.segments import Groups, lovasz_extension, on_device
from lovasz.core.softmax import Softmax, backward, given_probabilities, softmax, sum_over_classes
from lovasz.spec import (
    CrossEntropy,
    InvalidInput,
    LovaszHinge,
    LovaszSoftmax,
    Result,
    TermResult,
    WeightedSum,
)

PROBABILITY_TOLERANCE = 1e-3
"""How far a probability may stand outside [0, 1]; what is further out is taken for a mistake."""


@dataclass(frozen=True)
class _TermValues:
    """One term's values on the device; of ``losses`` and ``scored``, groups of one request stand side by side."""

    losses: Tensor  # float64, (K, groups); cross-entropy: (1, requests)
    scored: Tensor  # bool, (K, groups)
    per_image: bool


@dataclass(frozen=True)
class Launched:
    """A batch whose computation may still be running on its device."""

    requests: tuple[Request, ...]
    loss: WeightedSum
    batch: Ragged
    terms: tuple[_TermValues, ...]
    grad: Tensor | None
    intersection: Tensor
    union: Tensor
    faults: Tensor  # int64, (3, requests): bad labels, non-finite pixels, pixels with probabilities out of range

    def collect(self) -> list[Result[Tensor] | InvalidInput]:
        """Waits for the device; one answer a request, in their order. A request that cannot be computed with is
        answered by the error that says why, and the others are not touched by it."""
        bad_labels, not_finite, out_of_range = self.faults.cpu().numpy()
        terms = [(t.losses.cpu().numpy(), t.scored.cpu().numpy(), t.per_image) for t in self.terms]
        intersection, union = self.intersection.cpu().numpy(), self.union.cpu().numpy()
        grads = self._grads()
        answers: list[Result[Tensor] | InvalidInput] = []
        image = 0
        for r, request in enumerate(self.requests):
            images = slice(image, image + request.layout.images)
            image = images.stop
            if bad_labels[r]:
                answers.append(_label_error(request, self.loss))
            elif out_of_range[r]:
                answers.append(_probability_error(request, self.loss))
            elif not_finite[r]:
                answers.append(self._not_a_number(grads[r]))
            else:
                results = []
                for (_, loss), (losses, scored, per_image) in zip(self.loss.terms, terms, strict=True):
                    groups = images if per_image else slice(r, r + 1)
                    results.append(_term_result(loss, losses[:, groups], scored[:, groups]))
                total = sum(weight * term.loss for (weight, _), term in zip(self.loss.terms, results, strict=True))
                answers.append(Result(total, grads[r], tuple(results), intersection[:, r].copy(), union[:, r].copy()))
        return answers

    def _grads(self) -> Sequence[Tensor | None]:
        if self.grad is None:
            return [None] * len(self.requests)
        return unflatten(self.grad, self.batch, [request.logits.shape for request in self.requests])

    def _not_a_number(self, grad: Tensor | None) -> Result[Tensor]:
        nan, channels = float("nan"), len(self.batch.logits)
        terms = tuple(
            TermResult(loss.kind, nan, np.full(0 if isinstance(loss, CrossEntropy) else channels, nan))
            for _, loss in self.loss.terms
        )
        counts = np.zeros(channels, np.int64)
        return Result(nan, None if grad is None else torch.full_like(grad, nan), terms, counts, counts.copy())


def _term_result(
    loss: LovaszSoftmax | LovaszHinge | CrossEntropy, losses: npt.NDArray[np.float64], scored: npt.NDArray[np.bool_]
) -> TermResult:
    """Brings one request's segments together; on arrays of its own, so that the sums do not depend on the batch."""
    if isinstance(loss, CrossEntropy):
        return TermResult(loss.kind, float(losses[0, 0]), np.empty(0))
    losses = np.where(scored, losses, 0.0)
    weights = np.ones(len(losses))
    scored_classes = np.maximum(scored.sum(0), 1)
    if isinstance(loss, LovaszHinge):
        scored_classes = np.full(losses.shape[1], len(losses))
    elif loss.class_weights is not None:
        weights = np.asarray(loss.class_weights)
    groups = (weights[:, None] * losses).sum(0) / scored_classes
    per_class = np.full(len(losses), np.nan)
    np.divide(losses.sum(1), scored.sum(1), out=per_class, where=scored.any(1))
    return TermResult(loss.kind, float(groups.mean()), per_class)


def launch(requests: Sequence[Request], loss: WeightedSum, device: torch.device, *, want_grad: bool = True) -> Launched:
    """Queues the computation of requests that agree in element type and channels.

    The answer to each is bit-identical to that in a batch of its own.
    """
    with torch.no_grad():
        batch = flatten(requests, loss, device)
        computed = _hinge(batch, loss, want_grad) if loss.is_hinge else _softmax(batch, loss, want_grad)
        terms, grad, intersection, union, faults = computed
    return Launched(tuple(requests), loss, batch, terms, grad, intersection, union, faults)


_Computed = tuple[tuple[_TermValues, ...], Tensor | None, Tensor, Tensor, Tensor]


class _Validity:
    """Which pixels each term counts."""

    def __init__(self, batch: Ragged, loss: WeightedSum) -> None:
        labels = batch.labels
        in_range = (labels >= 0) & (labels < batch.layouts[0].label_values)
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
    terms: list[_TermValues] = []
    parts: list[Part] = []
    for weight, term in loss.terms:
        if isinstance(term, LovaszSoftmax):
            terms.append(_lovasz_softmax(term, weight, batch, soft, validity, g))
        elif isinstance(term, CrossEntropy):
            valid = validity.of(term)
            counts = _class_counts(labels, valid, batch.requests, len(batch.logits))
            parts.append(cross_entropy(term, weight, batch, soft, labels, valid, counts))
            values = parts[-1].loss.unsqueeze(0)
            terms.append(_TermValues(values, torch.ones_like(values, dtype=torch.bool), per_image=False))
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
    intersection = _class_counts(labels, hit, batch.requests, channels)
    union = _class_counts(labels, validity.counted, batch.requests, channels)
    union += _class_counts(soft.prediction, validity.counted, batch.requests, channels)
    union -= intersection
    return tuple(terms), grad, intersection, union, _faults(batch, loss, validity, soft)


def _lovasz_softmax(
    term: LovaszSoftmax, weight: float, batch: Ragged, soft: Softmax, validity: _Validity, g: Tensor | None
) -> _TermValues:
    labels, valid = validity.safe_labels, validity.of(term)
    groups, share = _groups(batch, term.per_image)
    channels, device = len(batch.logits), labels.device
    counts = _class_counts(labels, valid, groups, channels)
    if term.classes == "present":
        scored = counts > 0
    else:
        scored = (counts.sum(0) > 0).expand(counts.shape)
        if term.classes != "all":
            wanted = frozenset(term.classes)
            listed = on_device([c in wanted for c in range(channels)], torch.bool, device)
            scored = scored & listed.unsqueeze(1)
    class_weights = on_device(term.class_weights or [1.0] * channels, torch.float64, device)
    weights = weight * share * class_weights.unsqueeze(1) * scored / scored.sum(0).clamp(min=1)
    class_numbers = torch.arange(channels, device=device).unsqueeze(1)
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
    return _TermValues(losses, scored, term.per_image)


def _hinge(batch: Ragged, loss: WeightedSum, want_grad: bool) -> _Computed:
    validity = _Validity(batch, loss)
    logits, foreground = batch.logits, validity.safe_labels == 1
    errors = torch.where(foreground, 1 - logits, 1 + logits).clamp_(min=0)
    g = torch.zeros_like(logits) if want_grad else None
    terms: list[_TermValues] = []
    for weight, term in loss.terms:
        valid = validity.of(term)
        groups, share = _groups(batch, _per_image(term))
        counts = groups.sum(foreground & valid)
        scored = groups.sum(valid) > 0
        weights = (weight / len(logits) * share).to(logits.dtype).expand(counts.shape)
        losses = lovasz_extension(errors, foreground.__getitem__, valid, counts, groups, weights, g)
        terms.append(_TermValues(losses, scored, _per_image(term)))
    grad = None if g is None else torch.where(foreground, -g, g).mul_(errors > 0)
    if grad is not None and validity.any_ignored:
        grad.masked_fill_(~validity.counted, 0)
    predicted = logits > 0
    intersection = batch.requests.sum(predicted & foreground & validity.counted)
    union = batch.requests.sum((predicted | foreground) & validity.counted)
    return tuple(terms), grad, intersection, union, _faults(batch, loss, validity, None)


def _per_image(loss: LovaszSoftmax | LovaszHinge | CrossEntropy) -> bool:
    return not isinstance(loss, CrossEntropy) and loss.per_image


def _groups(batch: Ragged, per_image: bool) -> tuple[Groups, Tensor]:
    """The groups that are scored, and each one's share of its request's loss (float64, one a group)."""
    if not per_image:
        return batch.requests, torch.ones(len(batch.requests), dtype=torch.float64, device=batch.logits.device)
    shares = [1 / layout.images for layout in batch.layouts for _ in range(layout.images)]
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
    return torch.stack([batch.requests.sum(fault.reshape(-1, fault.shape[-1])).sum(0) for fault in faults])


def _label_error(request: Request, loss: WeightedSum) -> InvalidInput:
    labels = request.labels.to(torch.int64)
    for _, term in loss.terms:
        bad = (labels < 0) | (labels >= request.layout.label_values)
        if term.ignore_index is not None:
            bad &= labels != term.ignore_index
        if bad.any():
            break
    place = tuple(bad.nonzero()[0].tolist())
    ignore = "" if term.ignore_index is None else f" or the ignore_index {term.ignore_index} of {type(term).__name__}"
    expected = f"a value in [0, {request.layout.label_values}){ignore}"
    return InvalidInput(
        "labels", f"got {int(labels[place])} at index {list(place)}; expected {expected} ({int(bad.sum())} such pixels)"
    )


def _probability_error(request: Request, loss: WeightedSum) -> InvalidInput:
    values = request.logits.to(torch.promote_types(request.logits.dtype, torch.float32))  # as they were judged
    bad = (values < -PROBABILITY_TOLERANCE) | (values > 1 + PROBABILITY_TOLERANCE)
    labels = request.labels.to(torch.int64)
    counted = torch.zeros_like(labels, dtype=torch.bool)
    for _, term in loss.terms:
        counted |= labels != term.ignore_index if term.ignore_index is not None else True
    place = tuple((bad & counted.unsqueeze(1)).nonzero()[0].tolist())
    return InvalidInput(
        "logits",
        f"got {float(values[place])} at index {list(place)} with input='probabilities'; expected a value in [0, 1] "
        "(for scores before the softmax use input='logits')",
    )
