"""The torch backend's entry point: sorts all segments; no step waits for a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lovasz.core.backends.torch.binary import Sigmoid, binary_cross_entropy
from lovasz.core.backends.torch.cross_entropy import Part, cross_entropy
from lovasz.core.backends.torch.flat import Flat
from lovasz.core.backends.torch.segments import Groups, lovasz_extension, on_device
from lovasz.core.backends.torch.softmax import Softmax, backward, given_probabilities, softmax, sum_over_classes
from lovasz.core.batch import Batch
from lovasz.core.computed import PROBABILITY_TOLERANCE, Computed, Fault, TermValues, Values
from lovasz.core.plan import Plan, Term
from lovasz.core.scoring import segment_factors, select_segments
from lovasz.core.stop import Stop
from lovasz.spec import BinaryCrossEntropy, CrossEntropy, LovaszHinge, LovaszSigmoid, LovaszSoftmax


def compute(
    plan: Plan, batch: Batch, *, want_grad: bool, want_total: bool = False, stop: Stop | None = None
) -> Computed:
    """Queues the computation of a batch; offers no ``Computed.total`` and ignores ``stop``."""
    with torch.no_grad():
        flat = Flat.of(plan, batch)
        results = (_binary if plan.is_binary else _softmax)(flat, want_grad)
        grads = None if results.grad is None else flat.split(results.grad, batch)
    return Computed(grads, results.read)


@dataclass(frozen=True)
class _Results:
    """``Values`` that may still be on the device, and the gradient.

    Attributes:
        losses, scored: one per term.
        grad: shape (K, P); None if it is not wanted.
        counts: int64, shape (3, K, joints): labels, predictions, hits.
        faults: int64, shape (3, joints).
    """

    losses: Sequence[Tensor]
    scored: Sequence[Tensor]
    grad: Tensor | None
    counts: Tensor
    faults: Tensor

    def read(self) -> Values:
        terms = [
            TermValues(losses.cpu().numpy(), scored.cpu().numpy())
            for losses, scored in zip(self.losses, self.scored, strict=True)
        ]
        labels, predictions, hits = self.counts.cpu().numpy()
        return Values(tuple(terms), labels, predictions, hits, self.faults.cpu().numpy())


class _Validity:
    """Which pixels are valid, for each rule.

    Attributes:
        safe_labels: the labels, 0 where they are out of range.
        bad: bool: pixels whose label is out of range, and that some rule does not ignore.
        of_rule: bool, one per rule: its valid pixels.
        counted: bool: pixels that are valid for some rule.
        all_counted: whether the only rule ignores no label.
    """

    def __init__(self, flat: Flat) -> None:
        labels, plan = flat.labels, flat.plan
        in_range = (labels >= 0) & (labels < plan.label_values)
        self.safe_labels = torch.where(in_range, labels, 0)
        self.bad = torch.zeros_like(in_range)
        self.of_rule: list[Tensor] = []
        for rule in plan.rules:
            ignored = labels == rule if rule is not None else torch.zeros_like(in_range)
            self.of_rule.append(in_range & ~ignored)
            self.bad |= ~in_range & ~ignored
        self.counted = torch.stack(self.of_rule).any(0)
        self.all_counted = plan.rules == (None,)


def _softmax(flat: Flat, want_grad: bool) -> _Results:
    validity, plan = _Validity(flat), flat.plan
    labels, channels = validity.safe_labels, plan.channels
    given = plan.loss.probabilities
    soft = given_probabilities(flat.logits, labels) if given else softmax(flat.logits, labels)
    g = torch.zeros_like(flat.logits) if want_grad else None
    losses: list[Tensor] = []
    scored: list[Tensor] = []
    parts: list[Part] = []
    for term in plan.terms:
        valid = validity.of_rule[term.rule]
        counts = _class_counts(labels, valid, flat.groups(term), channels)
        if isinstance(term.loss, LovaszSoftmax):
            of_term, is_scored = _lovasz_softmax(term, flat, soft, labels, valid, counts, g)
        elif isinstance(term.loss, CrossEntropy):
            parts.append(cross_entropy(term, flat, soft, labels, valid, counts))
            of_term = parts[-1].loss.unsqueeze(0)
            is_scored = torch.ones_like(of_term, dtype=torch.bool)
        else:
            raise NotImplementedError(f"{term.loss.kind} as a softmax loss")
        losses.append(of_term)
        scored.append(is_scored)
    grad = None
    if g is not None:
        if given:
            grad = g.scatter_(0, labels.unsqueeze(0), -g.gather(0, labels.unsqueeze(0)))
        else:
            pull = torch.stack([part.pull for part in parts]) if parts else None
            grad = backward(soft, labels, g, None if pull is None else sum_over_classes(pull))
            for part in parts:
                part.add_spread(grad, soft, labels)
        if not validity.all_counted:
            grad.masked_fill_(~validity.counted, 0)
    hit = validity.counted & (soft.prediction == labels)
    classes_and_masks = (labels, validity.counted), (soft.prediction, validity.counted), (labels, hit)
    counts = torch.stack([_class_counts(classes, mask, flat.joints, channels) for classes, mask in classes_and_masks])
    finite = soft.finite
    for term in plan.cross_entropies:
        if term.label_smoothing > 0:  # A masked class has a part of the target, and an infinite loss.
            finite = finite & ~(soft.masked & validity.of_rule[term.rule])
    return _Results(losses, scored, grad, counts, _faults(flat, validity, finite))


def _lovasz_softmax(
    term: Term, flat: Flat, soft: Softmax, labels: Tensor, valid: Tensor, counts: Tensor, g: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Adds a term's gradients to ``g``; returns the losses of its segments, and which are scored."""
    groups, device = flat.groups(term), labels.device
    class_weights = on_device(term.class_weights, device)
    listed = None if term.listed is None else on_device(term.listed, device)
    scored, weights = select_segments(term, counts, segment_factors(term, groups.share, class_weights), listed)
    class_numbers = torch.arange(len(counts), device=device).unsqueeze(1)
    # On the CPU, only scored classes are sorted. On a GPU the host would have to wait to know them.
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
    return losses, scored


def _binary(flat: Flat, want_grad: bool) -> _Results:
    validity, plan = _Validity(flat), flat.plan
    logits, foreground = flat.logits, validity.safe_labels == 1
    margins = torch.where(foreground, logits, -logits)
    sigmoid = Sigmoid.of(margins) if plan.is_sigmoid or plan.binary_cross_entropies else None
    errors, slope = (1 - margins).clamp_(min=0), torch.empty(0)
    if sigmoid is not None and plan.is_sigmoid:
        errors, slope = sigmoid.errors, sigmoid.slope
    g = torch.zeros_like(logits) if want_grad and plan.lovasz else None
    losses: list[Tensor] = []
    scored: list[Tensor] = []
    parts: list[Tensor] = []
    for term in plan.terms:
        valid, groups = validity.of_rule[term.rule], flat.groups(term)
        if isinstance(term.loss, BinaryCrossEntropy):
            assert sigmoid is not None
            of_term, part = binary_cross_entropy(term, flat, margins, sigmoid, foreground, valid)
            is_scored = torch.ones_like(of_term, dtype=torch.bool)
            parts.append(part)
        elif isinstance(term.loss, LovaszHinge | LovaszSigmoid):
            class_weights = on_device(term.class_weights, logits.device)
            factors = segment_factors(term, groups.share, class_weights)
            is_scored, weights = select_segments(term, groups.sum(valid), factors, None)
            counts = groups.sum(foreground & valid)
            weights = weights.to(logits.dtype)
            of_term = lovasz_extension(errors, foreground.__getitem__, valid, counts, groups, weights, g)
        else:
            raise NotImplementedError(f"{term.loss.kind} as a binary loss")
        losses.append(of_term)
        scored.append(is_scored)
    grad = None
    if want_grad:
        grad = torch.zeros_like(logits) if g is None else g.mul_(slope if plan.is_sigmoid else errors > 0)
        for part in parts:
            grad += part
        grad = torch.where(foreground, -grad, grad)
        if not validity.all_counted:
            grad.masked_fill_(~validity.counted, 0)
    predicted = logits > 0
    masks = foreground, predicted, predicted & foreground
    counts = torch.stack([flat.joints.sum(mask & validity.counted) for mask in masks])
    finite = (logits < torch.inf) & (margins > -torch.inf)
    return _Results(losses, scored, grad, counts, _faults(flat, validity, finite))


def _class_counts(classes: Tensor, counted: Tensor, groups: Groups, channels: int) -> Tensor:
    """Counts the pixels of each class where ``counted`` is true: int64, shape (K, groups)."""
    counts = torch.zeros(channels * len(groups), dtype=torch.int64, device=classes.device)
    index = classes if len(groups) == 1 else classes * len(groups) + groups.of_pixel
    return counts.scatter_add_(0, index, counted.to(torch.int64)).view(channels, len(groups))


def _faults(flat: Flat, validity: _Validity, finite: Tensor) -> Tensor:
    """Counts pixels with each fault: int64, shape (3, joints)."""
    faults = {Fault.BAD_LABEL: validity.bad, Fault.NOT_FINITE: ~finite & validity.counted}
    faults[Fault.OUT_OF_RANGE] = torch.zeros_like(validity.bad)
    if flat.plan.loss.probabilities:
        low, high = -PROBABILITY_TOLERANCE, 1 + PROBABILITY_TOLERANCE
        outside = ((flat.logits < low) | (flat.logits > high)).any(0)
        faults[Fault.OUT_OF_RANGE] = outside & finite & validity.counted
    masks = (faults[fault] for fault in Fault)
    return torch.stack([flat.joints.sum(mask.reshape(-1, mask.shape[-1])).sum(0) for mask in masks])
