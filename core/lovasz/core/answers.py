"""Turns what a backend computed for a batch into an answer for each request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lovasz.core.batch import Batch, Request
from lovasz.core.computed import PROBABILITY_TOLERANCE, Computed
from lovasz.spec import (
    CrossEntropy,
    InvalidInput,
    LovaszHinge,
    LovaszSoftmax,
    Result,
    TermResult,
    WeightedSum,
)


class JointFault(Exception):
    """A request that is joined with others cannot be computed with, and so neither can these.

    Attributes:
        place: which one, counted from 0 in their joint.
        fault: what is wrong with it.
    """

    def __init__(self, place: int, fault: InvalidInput) -> None:
        super().__init__(f"request {place} of the joint: {fault}")
        self.place = place
        self.fault = fault


Answer = Result[Tensor] | InvalidInput | JointFault


@dataclass(frozen=True)
class Pending:
    """A batch whose computation may still be running on its device, in parts: one a backend."""

    requests: tuple[Request, ...]
    parts: tuple[Part, ...]

    def collect(self) -> list[Answer]:
        """Waits for the device; one answer a request, in their order. A request that cannot be computed with is
        answered by the error that says why, those that it is joined with by a ``JointFault``, and the others are not
        touched by it."""
        answers = {place: answer for part in self.parts for place, answer in part.collect()}
        return [answers[place] for place in range(len(self.requests))]

    def differentiable(self) -> tuple[Tensor | float, Tensor | None]:
        """The loss and the gradient of a single request, without waiting for more than its faults if that can be had.

        Raises:
            InvalidInput: it cannot be computed with.
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


@dataclass(frozen=True)
class Part:
    places: tuple[int, ...]
    batch: Batch
    loss: WeightedSum
    computed: Computed

    def collect(self) -> list[tuple[int, Answer]]:
        computed, values = self.computed, self.computed.values()
        bad_labels, not_finite, out_of_range = values.faults
        answers: list[Answer] = []
        image = 0
        for j, (joint, count) in enumerate(zip(self.batch.joints, self.batch.images, strict=True)):
            images = slice(image, image + count)
            image = images.stop
            grads = [None] * len(joint) if computed.grads is None else computed.grads[len(answers) :][: len(joint)]
            if bad_labels[j]:
                answers += _faults([_label_error(request, self.loss) for request in joint])
            elif out_of_range[j]:
                answers += _faults([_probability_error(request, self.loss) for request in joint])
            elif not_finite[j]:
                answers += [self._not_a_number(request, grad) for request, grad in zip(joint, grads, strict=True)]
            else:
                results = []
                for (_, loss), term in zip(self.loss.terms, values.terms, strict=True):
                    groups = images if term.per_image else slice(j, j + 1)
                    results.append(_term_result(loss, term.losses[:, groups], term.scored[:, groups]))
                total = sum(weight * term.loss for (weight, _), term in zip(self.loss.terms, results, strict=True))
                for grad in grads:
                    counts = values.intersection[:, j].copy(), values.union[:, j].copy()
                    answers.append(Result(total, grad, tuple(results), *counts))
        return list(zip(self.places, answers, strict=True))

    def _not_a_number(self, request: Request, grad: Tensor | None) -> Result[Tensor]:
        nan, channels = float("nan"), request.layout.channels
        terms = tuple(
            TermResult(loss.kind, nan, np.full(0 if isinstance(loss, CrossEntropy) else channels, nan))
            for _, loss in self.loss.terms
        )
        counts = np.zeros(channels, np.int64)
        return Result(nan, None if grad is None else grad.fill_(nan), terms, counts, counts.copy())


def _faults(of_requests: Sequence[InvalidInput | None]) -> list[Answer]:
    """The answers to a joint, of what is wrong with each of its requests."""
    place, first = next((place, fault) for place, fault in enumerate(of_requests) if fault is not None)
    return [JointFault(place, first) if fault is None else fault for fault in of_requests]


def _term_result(
    loss: LovaszSoftmax | LovaszHinge | CrossEntropy, losses: npt.NDArray[np.float64], scored: npt.NDArray[np.bool_]
) -> TermResult:
    """Brings one request's segments together; on arrays of its own, so that the sums do not depend on the batch."""
    if isinstance(loss, CrossEntropy):
        return TermResult(loss.kind, float(losses[0, 0]), np.empty(0))
    weights = loss.class_weights if isinstance(loss, LovaszSoftmax) else None
    if losses.shape[1] == 1:  # A group, as mostly: a few operations less, and a request has dozens of microseconds.
        is_scored = scored[:, 0]
        own = np.where(is_scored, losses[:, 0], 0.0)
        classes = len(own) if isinstance(loss, LovaszHinge) else max(int(np.count_nonzero(is_scored)), 1)
        total = own.sum() if weights is None else (np.asarray(weights) * own).sum()
        return TermResult(loss.kind, float(total) / classes, np.where(is_scored, own, np.nan))
    losses = np.where(scored, losses, 0.0)
    scored_classes = np.maximum(scored.sum(0), 1)
    if isinstance(loss, LovaszHinge):
        scored_classes = np.full(losses.shape[1], len(losses))
    weighted = losses if weights is None else np.asarray(weights)[:, None] * losses
    groups = weighted.sum(0) / scored_classes
    per_class = np.full(len(losses), np.nan)
    np.divide(losses.sum(1), scored.sum(1), out=per_class, where=scored.any(1))
    return TermResult(loss.kind, float(groups.mean()), per_class)


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
    return InvalidInput(
        "labels", f"got {int(labels[place])} at index {list(place)}; expected {expected} ({int(bad.sum())} such pixels)"
    )


def _probability_error(request: Request, loss: WeightedSum) -> InvalidInput | None:
    values = request.logits.to(torch.promote_types(request.logits.dtype, torch.float32))  # as they were judged
    bad = (values < -PROBABILITY_TOLERANCE) | (values > 1 + PROBABILITY_TOLERANCE)
    labels = request.labels.to(torch.int64)
    counted = torch.zeros_like(labels, dtype=torch.bool)
    for _, term in loss.terms:
        counted |= labels != term.ignore_index if term.ignore_index is not None else True
    bad &= counted.unsqueeze(1)
    if not bad.any():
        return None
    place = tuple(bad.nonzero()[0].tolist())
    return InvalidInput(
        "logits",
        f"got {float(values[place])} at index {list(place)} with input='probabilities'; expected a value in [0, 1] "
        "(for scores before the softmax use input='logits')",
    )
