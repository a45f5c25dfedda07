"""Computes a batch of requests at once and sorts the answers.

``launch`` queues all work on the device without waiting for it; ``Launched.collect`` waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lovasz.core.computed import PROBABILITY_TOLERANCE, Computed
from lovasz.core.paths import Path, checked, choose, compute
from lovasz.core.ragged import Request
from lovasz.core.stop import Stop
from lovasz.spec import (
    CrossEntropy,
    InvalidInput,
    LovaszHinge,
    LovaszSoftmax,
    Result,
    TermResult,
    WeightedSum,
)

Answer = Result[Tensor] | InvalidInput


@dataclass(frozen=True)
class Launched:
    """A batch whose computation may still be running on its device; in parts, one for each path that requests take."""

    requests: tuple[Request, ...]
    parts: tuple[_Part, ...]

    def collect(self) -> list[Answer]:
        """Waits for the device; one answer a request, in their order. A request that cannot be computed with is
        answered by the error that says why, and the others are not touched by it."""
        answers = {place: answer for part in self.parts for place, answer in part.collect()}
        return [answers[place] for place in range(len(self.requests))]


@dataclass(frozen=True)
class _Part:
    places: tuple[int, ...]
    requests: tuple[Request, ...]
    loss: WeightedSum
    computed: Computed

    def collect(self) -> list[tuple[int, Answer]]:
        computed = self.computed
        bad_labels, not_finite, out_of_range = computed.faults.cpu().numpy()
        terms = [(t.losses.cpu().numpy(), t.scored.cpu().numpy(), t.per_image) for t in computed.terms]
        intersection, union = computed.intersection.cpu().numpy(), computed.union.cpu().numpy()
        answers: list[Answer] = []
        image = 0
        for r, request in enumerate(self.requests):
            images = slice(image, image + request.layout.images)
            image = images.stop
            grad = None if computed.grads is None else computed.grads[r]
            if bad_labels[r]:
                answers.append(_label_error(request, self.loss))
            elif out_of_range[r]:
                answers.append(_probability_error(request, self.loss))
            elif not_finite[r]:
                answers.append(self._not_a_number(request, grad))
            else:
                results = []
                for (_, loss), (losses, scored, per_image) in zip(self.loss.terms, terms, strict=True):
                    groups = images if per_image else slice(r, r + 1)
                    results.append(_term_result(loss, losses[:, groups], scored[:, groups]))
                total = sum(weight * term.loss for (weight, _), term in zip(self.loss.terms, results, strict=True))
                answers.append(Result(total, grad, tuple(results), intersection[:, r].copy(), union[:, r].copy()))
        return list(zip(self.places, answers, strict=True))

    def _not_a_number(self, request: Request, grad: Tensor | None) -> Result[Tensor]:
        nan, channels = float("nan"), request.layout.channels
        terms = tuple(
            TermResult(loss.kind, nan, np.full(0 if isinstance(loss, CrossEntropy) else channels, nan))
            for _, loss in self.loss.terms
        )
        counts = np.zeros(channels, np.int64)
        return Result(nan, None if grad is None else grad.fill_(nan), terms, counts, counts.copy())


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


def launch(
    requests: Sequence[Request],
    loss: WeightedSum,
    device: torch.device,
    *,
    want_grad: bool = True,
    path: Path | None = None,
    stop: Stop | None = None,
) -> Launched:
    """Queues the computation of requests that agree in element type and channels.

    The answer to each is bit-identical to that in a batch of its own.

    Args:
        path: how to compute them; None for the fastest that fits each.
        stop: asks for an early end, which the compiled loops of the CPU listen to.

    Raises:
        InvalidInput: the path cannot be taken here.
        Stopped: it was asked to end early.
    """
    places: dict[Path, list[int]] = {}
    for place, request in enumerate(requests):
        taken = choose(request, loss, device) if path is None else checked(path, request, device)
        places.setdefault(taken, []).append(place)
    parts = []
    for taken, members in places.items():
        own = tuple(requests[place] for place in members)
        computed = compute(taken, own, loss, device, want_grad=want_grad, stop=stop)
        parts.append(_Part(tuple(members), own, loss, computed))
    return Launched(tuple(requests), tuple(parts))


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
