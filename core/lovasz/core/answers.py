"""Turns what a backend computed for a batch into one answer per request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lovasz.core.batch import Batch, Request
from lovasz.core.computed import PROBABILITY_TOLERANCE, Computed, Fault, Values
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
        answers = {place: answer for part in self.parts for place, answer in _answers(part)}
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
        if total is not None:
            assert part.computed.grads is not None
            return total, part.computed.grads[0]
        (answer,) = self.collect()
        if not isinstance(answer, Result):
            raise answer
        return answer.loss, answer.grad


def _answers(part: Part) -> list[tuple[int, Answer]]:
    plan, grads_of_all, values = part.plan, part.computed.grads, part.computed.values()
    union = values.union
    union[_void_segments(plan.loss, len(union))] = 0
    answers: list[Answer] = []
    image = 0
    for j, (joint, count) in enumerate(zip(part.batch.joints, plan.images, strict=True)):
        images = slice(image, image + count)
        image = images.stop
        grads = [None] * len(joint) if grads_of_all is None else grads_of_all[len(answers) :][: len(joint)]
        if values.faults[Fault.BAD_LABEL, j] or values.faults[Fault.OUT_OF_RANGE, j]:
            answers += _faults([fault_of(request, plan.loss, values, j) for request in joint])
        elif values.faults[Fault.NOT_FINITE, j]:
            answers += [_not_a_number(plan.loss, request, grad) for request, grad in zip(joint, grads, strict=True)]
        else:
            total, results = _loss(plan, values, j, images)
            first = 0
            for request, grad in zip(joint, grads, strict=True):
                own = slice(first, first + request.layout.scored_images)
                first = own.stop
                counts = values.hits[:, j].copy(), union[:, j].copy()
                answers.append(Result(total, grad, tuple(_of_request(result, own) for result in results), *counts))
    return list(zip(part.places, answers, strict=True))


def result_of_rank(plan: Plan, request: Request, grad: Tensor | None, values: Values, first: int) -> Result[Tensor]:
    """The result of one rank's request, from the values of a joint whose other requests are in other processes.

    Args:
        plan: of this rank's part.
        values: of the joint, which has neither bad labels nor numbers out of range.
        first: the number of images of the ranks before this one.
    """
    if values.faults[Fault.NOT_FINITE, 0]:
        return _not_a_number(plan.loss, request, grad)
    union = values.union
    union[_void_segments(plan.loss, len(union))] = 0
    total, results = _loss(plan, values, 0, slice(None))
    own = slice(first, first + request.layout.scored_images)
    return Result(total, grad, tuple(_of_request(result, own) for result in results), values.hits[:, 0], union[:, 0])


def fault_of(request: Request, loss: WeightedSum, values: Values, joint: int) -> InvalidInput | None:
    """The worst fault of a joint's labels or probabilities, if this request has it."""
    if values.faults[Fault.BAD_LABEL, joint]:
        return _label_error(request, loss)
    return _probability_error(request, loss) if values.faults[Fault.OUT_OF_RANGE, joint] else None


def _loss(plan: Plan, values: Values, joint: int, images: slice) -> tuple[float, list[TermResult]]:
    """The loss of a joint without faults, and the results of its terms."""
    results = []
    for term, of_term in zip(plan.terms, values.terms, strict=True):
        groups = images if term.per_image else slice(joint, joint + 1)
        results.append(_term_result(term.loss, of_term.losses[:, groups], of_term.scored[:, groups]))
    return sum(term.weight * result.loss for term, result in zip(plan.terms, results, strict=True)), results


def _of_request(result: TermResult, images: slice) -> TermResult:
    """A term's result for one request of a joint, whose losses of images are of all requests."""
    if len(result.per_image_loss) == 0:
        return result
    losses = result.per_image_loss[images if images.stop - images.start <= MAX_IMAGE_LOSSES else slice(0)]
    return replace(result, per_image_loss=losses.copy())


def _void_segments(loss: WeightedSum, segments: int) -> slice:
    """The rows of counts whose class (binary losses: foreground) every term ignores: they have no IoU."""
    void = loss.void_label
    if loss.is_binary:
        return slice(segments if void == 1 else 0)
    return slice(0) if void is None or not 0 <= void < segments else slice(void, void + 1)


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
    place, first = next((place, fault) for place, fault in enumerate(of_requests) if fault is not None)
    return [JointFault(place, first) if fault is None else fault for fault in of_requests]


def _term_result(loss: Loss, losses: npt.NDArray[np.float64], scored: npt.NDArray[np.bool_]) -> TermResult:
    """The result of one term for one joint.

    Works on the arrays of this joint alone, so that the order in which NumPy sums does not depend on the batch.
    """
    if not isinstance(loss, LovaszLoss):
        return TermResult(loss.kind, float(losses[0, 0]), np.empty(0))
    weights = loss.class_weights if isinstance(loss, LovaszSoftmax) else None
    if losses.shape[1] == 1:  # One group, the common case: fewer NumPy calls, which matters for small requests.
        is_scored = scored[:, 0]
        own = np.where(is_scored, losses[:, 0], 0.0)
        classes = len(own) if isinstance(loss, BinaryLoss) else max(int(np.count_nonzero(is_scored)), 1)
        total = own.sum() if weights is None else (np.asarray(weights) * own).sum()
        value = float(total) / classes
        image = np.array([value]) if loss.per_image else np.empty(0)
        return TermResult(loss.kind, value, np.where(is_scored, own, np.nan), image)
    losses = np.where(scored, losses, 0.0)
    scored_classes = np.maximum(scored.sum(0), 1)
    if isinstance(loss, BinaryLoss):
        scored_classes = np.full(losses.shape[1], len(losses))
    weighted = losses if weights is None else np.asarray(weights)[:, None] * losses
    groups = weighted.sum(0) / scored_classes
    per_class = np.full(len(losses), np.nan)
    np.divide(losses.sum(1), scored.sum(1), out=per_class, where=scored.any(1))
    return TermResult(loss.kind, float(groups.mean()), per_class, groups)


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
    cure = f"; for void pixels set ignore_index={value}" if value in _VOID_LABELS else ""
    if value == 255 and isinstance(term, BinaryLoss):
        cure = "; for masks of 0 and 255 pass labels > 0, for void pixels set ignore_index=255"
    return InvalidInput(
        "labels", f"got {value} at index {list(place)}; expected {expected} ({int(bad.sum())} such pixels{cure})"
    )


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
