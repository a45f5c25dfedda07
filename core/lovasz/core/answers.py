"""Turns what a backend computed for a batch into one answer per request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lovasz.core.batch import Batch, Request
from lovasz.core.computed import PROBABILITY_TOLERANCE, Computed, Fault, TermValues, Values
from lovasz.core.plan import Plan
from lovasz.spec import (
    MAX_IMAGE_LOSSES,
    BinaryLoss,
    InvalidInput,
    Loss,
    LovaszLoss,
    LovaszSoftmax,
    Result,
    TermResult,
    WeightedSum,
)

_VOID_LABELS = (255, -1, -100)
"""Labels that usually mark void pixels."""


class JointFault(Exception):
    """A request cannot be computed because another request of its joint has a fault.

    Attributes:
        place: the position of the other request in the joint, from 0.
        fault: its fault.
    """

    def __init__(self, place: int, fault: InvalidInput) -> None:
        super().__init__(f"request {place} of the joint: {fault}")
        self.place = place
        self.fault = fault


Answer = Result[Tensor] | InvalidInput | JointFault


@dataclass(frozen=True)
class Part:
    """The requests of a batch that one backend computes together.

    Attributes:
        places: the positions of these requests in the whole batch.
    """

    places: tuple[int, ...]
    plan: Plan
    batch: Batch
    computed: Computed

    def values(self) -> tuple[Values, bool]:
        """What was computed, except the gradients, and whether a joint has a fault; waits for the device.

        Joints with faults score no segment.
        """
        values = self.computed.values()
        is_faulty = bool(values.faults.any())
        return _without_faults(self.plan, values) if is_faulty else values, is_faulty


@dataclass(frozen=True)
class Pending:
    """A batch whose computation may still be running on its device.

    Attributes:
        whole: the batch, with requests that have no images; no part has these.
        loss: of all its requests.
        want_grad: whether the gradients are wanted, too.
    """

    whole: Batch
    parts: tuple[Part, ...]
    loss: WeightedSum
    want_grad: bool

    def collect(self) -> list[Answer]:
        """Waits for the device; returns one answer per request, in the order of the requests.

        The answer to a request with a fault is the error that says why. The answer to the other requests of its joint
        is a ``JointFault``. Other joints are not affected. A request without images gets the answer of its joint.
        """
        answers: dict[int, Answer] = {}
        for part in self.parts:
            answers.update(zip(part.places, _answers(part), strict=True))
        if len(answers) < len(self.whole.requests):
            self._add_empty(answers)
        return [answers[place] for place in range(len(self.whole.requests))]

    def _add_empty(self, answers: dict[int, Answer]) -> None:
        """Adds the answers to requests without images; the positions in joints become those among all requests."""
        stop = 0
        for joint in self.whole.joints:
            start, stop = stop, stop + len(joint)
            present = [place for place in range(start, stop) if place in answers]
            fault: JointFault | None = None
            for place in present:
                answer = answers[place]
                if isinstance(answer, JointFault):
                    answers[place] = JointFault(present[answer.place] - start, answer.fault)
                elif isinstance(answer, InvalidInput):
                    fault = fault or JointFault(place - start, answer)
            of_joint = answers[present[0]] if present else _nothing(self.loss, joint[0].layout.channels)
            for place, request in enumerate(joint, start):
                if place not in answers:
                    answers[place] = fault or self._with_empty_grad(of_joint, request)

    def _with_empty_grad(self, answer: Answer, request: Request) -> Answer:
        """The answer of a joint, for a request without images."""
        assert isinstance(answer, Result)
        logits, grad = request.logits, None
        if self.want_grad:
            dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
            grad = torch.empty(logits.shape, dtype=dtype, device=logits.device)
        terms = tuple(replace(term, per_image_loss=np.empty(0)) for term in answer.terms)
        return Result(answer.loss, grad, terms, answer.intersection.copy(), answer.union.copy())

    def differentiable(self) -> tuple[Tensor | float, Tensor | None]:
        """The loss and the gradient of a single request; waits only until its faults are known, if the backend can.

        Raises:
            InvalidInput: the request cannot be computed.
        """
        (part,) = self.parts
        total = None if part.computed.total is None else part.computed.total()
        grad = None if part.computed.grads is None else part.computed.grads[0]
        if total is not None:
            return total, grad
        values, is_faulty = part.values()
        if not is_faulty:
            (loss,), _ = _losses(part.plan, values)
            return loss, grad
        (answer,) = self.collect()
        if not isinstance(answer, Result):
            raise answer
        return answer.loss, answer.grad


def _answers(part: Part) -> list[Answer]:
    plan, batch, grads, (values, is_faulty) = part.plan, part.batch, part.computed.grads, part.values()
    totals, of_terms = _losses(plan, values)
    terms = _term_results(plan, values, of_terms)
    if len(batch.sizes) < len(batch.requests):
        joint_of = [j for j, size in enumerate(batch.sizes) for _ in range(size)]
        totals, terms = [totals[j] for j in joint_of], [terms[j] for j in joint_of]
    if plan.loss.scores_images:
        terms = _with_own_images(batch, terms)
    # Each request has rows of its own: callers may write to what they get.
    hits, union = values.hits.T.repeat(batch.sizes, axis=0), _union(plan, values).T.repeat(batch.sizes, axis=0)
    answers: list[Answer] = list(map(Result, totals, grads or repeat(None), terms, hits, union))
    if is_faulty:
        _replace_faulty(answers, part, values)
    return answers


def _with_own_images(batch: Batch, terms: list[tuple[TermResult, ...]]) -> list[tuple[TermResult, ...]]:
    """The results of the terms for each request, with the losses of its own images alone.

    Args:
        terms: of each request, with the losses of all images of its joint.
    """
    own_terms, of_joints = [], iter(terms)
    for joint in batch.joints:
        first = 0
        for request in joint:
            own = slice(first, first + request.layout.scored_images)
            first = own.stop
            own_terms.append(tuple([_of_request(result, own) for result in next(of_joints)]))
    return own_terms


def _replace_faulty(answers: list[Answer], part: Part, values: Values) -> None:
    """Puts errors and NaN in the place of the answers to joints with faults."""
    loss, stop = part.plan.loss, 0
    for j, (joint, faults) in enumerate(zip(part.batch.joints, values.faults.T.tolist(), strict=True)):
        start, stop = stop, stop + len(joint)
        if faults[Fault.BAD_LABEL] or faults[Fault.OUT_OF_RANGE]:
            answers[start:stop] = _faults([fault_of(request, loss, values, j) for request in joint])
        elif faults[Fault.NOT_FINITE]:
            grads = part.computed.grads or (None,) * stop
            answers[start:stop] = map(_not_a_number, repeat(loss), joint, grads[start:stop])


def result_of_rank(plan: Plan, request: Request, grad: Tensor | None, values: Values, first: int) -> Result[Tensor]:
    """The result of one rank's request, from the values of a joint whose other requests are in other processes.

    Args:
        plan: of this rank's part.
        values: of the joint, which has neither bad labels nor numbers out of range.
        first: the number of images of the ranks before this one.
    """
    if values.faults[Fault.NOT_FINITE, 0]:
        return _not_a_number(plan.loss, request, grad)
    (total,), of_terms = _losses(plan, values)
    (results,) = _term_results(plan, values, of_terms)
    own = slice(first, first + request.layout.scored_images)
    terms = tuple(_of_request(result, own) for result in results)
    return Result(total, grad, terms, values.hits[:, 0], _union(plan, values)[:, 0])


def _union(plan: Plan, values: Values) -> npt.NDArray[np.int64]:
    """``Values.union``, 0 for a class that every term ignores."""
    union = values.union
    union[plan.void_segments] = 0
    return union


def fault_of(request: Request, loss: WeightedSum, values: Values, joint: int) -> InvalidInput | None:
    """The worst fault of a joint's labels or probabilities, if this request has it."""
    if values.faults[Fault.BAD_LABEL, joint]:
        return _label_error(request, loss)
    return _probability_error(request, loss) if values.faults[Fault.OUT_OF_RANGE, joint] else None


def _without_faults(plan: Plan, values: Values) -> Values:
    """The values with no segment scored in joints with faults, whose losses NumPy would warn of."""
    healthy = ~values.faults.any(0)
    terms = []
    for term, of_term in zip(plan.terms, values.terms, strict=True):
        of_groups = np.repeat(healthy, plan.images) if term.per_image else healthy
        terms.append(TermValues(of_term.losses, of_term.scored & of_groups))
    return replace(values, terms=tuple(terms))


def _losses(plan: Plan, values: Values) -> tuple[list[float], list[list[float]]]:
    """The loss of each joint, and of each term its loss for each joint; undefined for joints with faults."""
    totals, of_terms = [0.0] * len(plan.sizes), []
    for term, of_term in zip(plan.terms, values.terms, strict=True):
        losses = of_term.losses[0]
        if isinstance(term.loss, LovaszLoss):
            losses = _of_groups(term.loss, of_term)
        if term.per_image:
            losses = np.array([images.mean() for images in _split(losses, plan)])
        of_term_losses: list[float] = losses.tolist()
        totals = [total + term.weight * loss for total, loss in zip(totals, of_term_losses, strict=True)]
        of_terms.append(of_term_losses)
    return totals, of_terms


def _of_groups(loss: LovaszLoss, values: TermValues) -> npt.NDArray[np.float64]:
    """The loss of each group, before the term's weight: the sum over its classes, divided by their number.

    Adds one class after the other, so that the bits of a group do not depend on the number of groups.
    """
    losses, scored = np.where(values.scored, values.losses, 0.0), values.scored
    if isinstance(loss, LovaszSoftmax) and loss.class_weights is not None:
        losses *= np.array(loss.class_weights)[:, None]
    total: npt.NDArray[np.float64] = np.add.accumulate(losses, axis=0)[-1]
    return total / (len(scored) if isinstance(loss, BinaryLoss) else np.maximum(np.add.reduce(scored, axis=0), 1))


def _split(of_groups: npt.NDArray[Any], plan: Plan) -> list[npt.NDArray[Any]]:
    """Arrays with one element (or column) per image, in parts: one per joint."""
    return [of_groups] if len(plan.sizes) == 1 else np.split(of_groups, np.cumsum(plan.images)[:-1], axis=-1)


def _term_results(plan: Plan, values: Values, of_terms: list[list[float]]) -> list[tuple[TermResult, ...]]:
    """The results of the terms for each joint."""
    columns, nothing = [], np.empty(0)
    for term, of_term, losses in zip(plan.terms, values.terms, of_terms, strict=True):
        kind, joints = term.loss.kind, range(len(plan.sizes))
        if not isinstance(term.loss, LovaszLoss):
            columns.append([TermResult(kind, loss, nothing, nothing) for loss in losses])
        elif not term.per_image:
            of_classes = np.where(of_term.scored, of_term.losses, np.nan).T.copy()
            columns.append(list(map(TermResult, repeat(kind), losses, of_classes, repeat(nothing))))
        else:
            images = _split(_of_groups(term.loss, of_term), plan)
            scored, own = _split(of_term.scored, plan), _split(of_term.losses, plan)
            columns.append([TermResult(kind, losses[j], _mean(own[j], scored[j]), images[j]) for j in joints])
    return list(zip(*columns, strict=True))


def _mean(losses: npt.NDArray[np.float64], scored: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """The mean loss of each class over the groups that score it; NaN if none does."""
    mean = np.full(len(losses), np.nan)
    np.divide(np.where(scored, losses, 0.0).sum(1), scored.sum(1), out=mean, where=scored.any(1))
    return mean


def _of_request(result: TermResult, images: slice) -> TermResult:
    """A term's result for one request of a joint, whose losses of images are of all requests."""
    if len(result.per_image_loss) == 0:
        return result
    losses = result.per_image_loss[images if images.stop - images.start <= MAX_IMAGE_LOSSES else slice(0)]
    return replace(result, per_image_loss=losses.copy())


def _nothing(loss: WeightedSum, channels: int) -> Result[Tensor]:
    """The answer to a joint without images: no class is scored."""
    terms = tuple(
        TermResult(term.kind, 0.0, np.full(channels if isinstance(term, LovaszLoss) else 0, np.nan))
        for _, term in loss.terms
    )
    counts = np.zeros(channels, np.int64)
    return Result(0.0, None, terms, counts, counts)


def _not_a_number(loss: WeightedSum, request: Request, grad: Tensor | None) -> Result[Tensor]:
    nan, channels, images = float("nan"), request.layout.channels, request.layout.scored_images
    images = images if images <= MAX_IMAGE_LOSSES else 0
    terms = tuple(
        TermResult(
            term.kind,
            nan,
            np.full(channels if isinstance(term, LovaszLoss) else 0, nan),
            np.full(images if isinstance(term, LovaszLoss) and term.per_image else 0, nan),
        )
        for _, term in loss.terms
    )
    counts = np.zeros(channels, np.int64)
    return Result(nan, None if grad is None else grad.fill_(nan), terms, counts, counts.copy())


def _faults(of_requests: Sequence[InvalidInput | None]) -> list[Answer]:
    """The answers to a joint, from the fault of each of its requests."""
    found = [(place, fault) for place, fault in enumerate(of_requests) if fault is not None]
    if not found:  # The tensors may be in memory that others can write to.
        changed = "changed while the loss was computed; expected tensors that stay as they are until the answer"
        return [InvalidInput("logits", changed)] * len(of_requests)
    place, first = found[0]
    return [JointFault(place, first) if fault is None else fault for fault in of_requests]


def _label_error(request: Request, loss: WeightedSum) -> InvalidInput | None:
    labels = request.labels.to(torch.int64)
    for _, term in loss.terms:
        bad = (labels < 0) | (labels >= request.layout.label_values)
        if term.ignore_index is not None:
            bad &= labels != term.ignore_index
        if bad.any():
            break
    else:
        return None
    place = tuple(bad.nonzero()[0].tolist())
    ignore = "" if term.ignore_index is None else f" or the ignore_index {term.ignore_index} of {type(term).__name__}"
    expected = f"a value in [0, {request.layout.label_values}){ignore}"
    value = int(labels[place])
    cure = _cure_of_label(value, term, loss, labels, request.layout.label_values)
    return InvalidInput(
        "labels", f"got {value} at index {list(place)}; expected {expected} ({int(bad.sum())} such pixels{cure})"
    )


def _cure_of_label(value: int, refusing: Loss, loss: WeightedSum, labels: torch.Tensor, label_values: int) -> str:
    """What to do about a label that is no class to a term, if its value tells."""
    losses = [term for _, term in loss.terms]
    ignoring = next((type(term).__name__ for term in losses if term.ignore_index == value), None)
    if ignoring:
        other = type(refusing).__name__
        return f"; {value} is the ignore_index of {ignoring}, not of {other}: set ignore_index={value} in every term"
    if value in _VOID_LABELS:
        binary = "for masks of 0 and 255 pass labels > 0, " if value == 255 and loss.is_binary else ""
        return f"; {binary}for void pixels set ignore_index={value}{' in every term' if len(losses) > 1 else ''}"
    if value == label_values and not loss.is_binary and not bool((labels == 0).any()):
        return f"; classes count from 0: for labels 1 to {value} pass labels - 1"
    return ""


def _probability_error(request: Request, loss: WeightedSum) -> InvalidInput | None:
    values = request.logits.detach().to(
        torch.promote_types(request.logits.dtype, torch.float32)
    )  # as backends compare them
    bad = (values < -PROBABILITY_TOLERANCE) | (values > 1 + PROBABILITY_TOLERANCE)
    labels = request.labels.to(torch.int64)
    counted = torch.zeros_like(labels, dtype=torch.bool)
    for _, term in loss.terms:
        counted |= labels != term.ignore_index if term.ignore_index is not None else True
    bad &= counted.reshape(values.shape[0], 1, *values.shape[2:])
    if not bad.any():
        return None
    place = tuple(bad.nonzero()[0].tolist())
    return InvalidInput(
        "logits",
        f"got {float(values[place])} at index {list(place)} with input='probabilities'; expected a value in [0, 1] "
        "(for scores before the softmax use input='logits')",
    )
