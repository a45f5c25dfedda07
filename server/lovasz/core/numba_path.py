"""The path of the CPU: loops compiled by Numba over pixels as they stand in the requests, nothing copied.

Four steps, each in parallel: errors and counts from logits and labels; cross-entropy's sums; the segments of each
Lovász term (docs/mathematics.md, sections 7 and 11); the way back through softmax, in place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lovasz.core import bins
from lovasz.core.computed import PROBABILITY_TOLERANCE, Computed, TermValues, score
from lovasz.core.numba_kernels import hinge, segments, softmax, tables
from lovasz.core.numba_kernels.images import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT8,
    INT16,
    INT32,
    INT64,
    UINT8,
    Blocks,
    Images,
    Labelling,
)
from lovasz.core.numba_kernels.scratch import SCRATCH, Scratch
from lovasz.core.numba_kernels.segments import ABSENT, COUNTED, SORTED, Parts, Rules, Segments
from lovasz.core.numba_kernels.softmax import Counts, CrossEntropies
from lovasz.core.numba_kernels.workers import WORKERS, thread_count
from lovasz.core.ragged import Request
from lovasz.core.softmax import sum_over_classes
from lovasz.spec import CrossEntropy, LovaszHinge, LovaszSoftmax, WeightedSum

_FLOAT_KINDS = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
_LABEL_KINDS = {
    torch.bool: UINT8,
    torch.uint8: UINT8,
    torch.int8: INT8,
    torch.int16: INT16,
    torch.int32: INT32,
    torch.int64: INT64,
}

_ALONE_ELEMENTS = 1 << 15
"""So few elements are computed in the calling thread: to wake another takes as long."""

_BLOCK_PIXELS = 1 << 14
"""Pixels of a task; each has to claim it and to add up its counts."""

_FEW_PIXELS = 64
"""Images with fewer pixels are joined."""

_ROW_PADDING = 1040
"""Elements between rows of scratch. Where rows are a power of two apart, they compete for the same lines of a cache."""

_FIXED_POINT_BITS = 60


class Threshold(NamedTuple):
    """From how many pixels, and pixels of foreground, a segment is counted in tables."""

    pixels: int
    foreground: int


def compute(requests: Sequence[Request], loss: WeightedSum, *, want_grad: bool, counted_from: Threshold) -> Computed:
    """Computes requests that agree in element type (16 or 32 bits) and channels.

    Args:
        counted_from: segments below this are sorted.
    """
    with SCRATCH.borrow() as scratch:
        batch = _Batch(requests, loss, scratch, want_grad=want_grad)
        terms = _hinge(batch, counted_from) if loss.is_hinge else _softmax(batch, counted_from)
    intersection, union = batch.intersection_and_union()
    grads = batch.grads() if want_grad else None
    faults = torch.from_numpy(batch.counts.faults.reshape(3, -1))
    return Computed(tuple(terms), grads, intersection, union, faults)


@dataclass(frozen=True)
class _Member:
    """One request's tensors, contiguous: (images, K, pixels), labels without K but for the hinge.

    Many images of a few pixels each, as of a point cloud, are joined to one: loops run along the pixels of an image.
    """

    request: Request
    images: int
    pixels: int
    logits: Tensor
    labels: Tensor
    grad: Tensor
    """float32, in the layout of the logits; empty if none is wanted."""

    @classmethod
    def of(cls, request: Request, loss: WeightedSum, *, may_join: bool, want_grad: bool) -> _Member:
        layout, logits, labels = request.layout, request.logits.detach(), request.labels.detach()
        images, pixels = layout.images, layout.pixels
        if may_join and images > 1 and pixels < _FEW_PIXELS:
            logits = logits.reshape(images, layout.channels, pixels).transpose(0, 1)
            if loss.is_hinge:
                labels = labels.reshape(images, layout.channels, pixels).transpose(0, 1)
            images, pixels = 1, images * pixels
        # Of NumPy, as it asks the system for large pages.
        grad = np.empty(images * layout.channels * pixels if want_grad else 0, np.float32)
        return cls(request, images, pixels, logits.contiguous(), labels.contiguous(), torch.from_numpy(grad))

    def grad_of_request(self) -> Tensor:
        layout, shape = self.request.layout, self.request.logits.shape
        if self.images == layout.images:
            return self.grad.view(shape)
        return self.grad.view(layout.channels, layout.images, layout.pixels).transpose(0, 1).reshape(shape).contiguous()


class _Batch:
    """The requests as compiled code takes them, and what it counts in them."""

    def __init__(self, requests: Sequence[Request], loss: WeightedSum, scratch: Scratch, *, want_grad: bool) -> None:
        self.loss, self.scratch, self.want_grad = loss, scratch, want_grad
        may_join = not any(isinstance(term, LovaszSoftmax | LovaszHinge) and term.per_image for _, term in loss.terms)
        self._members = [_Member.of(request, loss, may_join=may_join, want_grad=want_grad) for request in requests]
        self.channels = requests[0].layout.channels
        self.request_images = np.array([member.images for member in self._members])
        self.images_before = np.cumsum(self.request_images) - self.request_images
        self.request_pixels = np.array([member.images * member.pixels for member in self._members])
        self.logits_kind = _FLOAT_KINDS[requests[0].logits.dtype]
        self.images = self._images()
        self.pixels = int(self.request_pixels.sum())
        self.blocks = self._blocks()
        elements = self.pixels * self.channels
        self.threads = 1 if elements < _ALONE_ELEMENTS else thread_count()
        self.labelling = self._labelling(requests[0].layout.label_values)
        labels, predictions, hits = np.zeros((3, len(self.images.start) * self.channels), np.int64)
        self.counts = Counts(labels, predictions, hits, np.zeros(3 * len(requests), np.int64))
        self.errors = self._rows("errors", np.float32)

    def _images(self) -> Images:
        channels, members = self.channels, self._members
        label_rows = channels if self.loss.is_hinge else 1
        request = np.repeat(np.arange(len(members)), self.request_images)
        number = np.arange(len(request)) - self.images_before[request]
        pixels = np.array([member.pixels for member in members])[request]

        def planes(rows: int, tensors: Sequence[Tensor]) -> npt.NDArray[np.uint64]:
            first = np.array([tensor.data_ptr() for tensor in tensors], np.uint64)[request]
            size = np.array([tensor.element_size() for tensor in tensors])[request]
            addresses: npt.NDArray[np.uint64] = first + (number * pixels * rows * size).astype(np.uint64)
            return addresses

        return Images(
            logits=planes(channels, [member.logits for member in members]),
            labels=planes(label_rows, [member.labels for member in members]),
            label_kind=np.array([_LABEL_KINDS[member.labels.dtype] for member in members])[request],
            grads=planes(channels, [member.grad for member in members]),
            start=np.cumsum(pixels) - pixels,
            pixels=pixels,
            request=request,
        )

    def grads(self) -> tuple[Tensor, ...]:
        """The gradients in the shapes of the requests."""
        return tuple(member.grad_of_request() for member in self._members)

    def clear_grads(self, scored_images: npt.NDArray[np.bool_] | None = None) -> None:
        """Sets gradients to 0; of each image only the classes that are not scored, if these are given."""
        image = 0
        for member in self._members:
            planes = member.grad.numpy().reshape(member.images, self.channels, member.pixels)
            if scored_images is None:
                planes[:] = 0
            else:
                planes[~scored_images[image : image + member.images]] = 0
            image += member.images

    def _blocks(self) -> Blocks:
        pixels = self.images.pixels
        per_image = -(-pixels // _BLOCK_PIXELS)
        image = np.repeat(np.arange(len(pixels)), per_image)
        first = (np.arange(len(image)) - np.repeat(np.cumsum(per_image) - per_image, per_image)) * _BLOCK_PIXELS
        return Blocks(image, first, np.minimum(first + _BLOCK_PIXELS, pixels[image]))

    def _labelling(self, values: int) -> Labelling:
        ignored = {term.ignore_index for _, term in self.loss.terms}
        common = next(iter(ignored)) if len(ignored) == 1 else None
        return Labelling(values, values, 0 if common is None else common, common is not None)

    def ignored_code(self, term: LovaszSoftmax | LovaszHinge | CrossEntropy) -> int:
        """The code that this term ignores and others may not; ``void`` if there is none."""
        index = term.ignore_index
        return self.labelling.void if index is None or not 0 <= index < self.labelling.values else index

    def _rows(self, name: str, dtype: Any, rows: int | None = None) -> npt.NDArray[Any]:
        """Rows of scratch, longer than there are pixels; not cut to that, as the compiler wants them contiguous."""
        rows = rows or self.channels
        padded = self.pixels + (_ROW_PADDING if rows > 1 else 0)
        return self.scratch.array(name, (rows, padded), dtype)

    def codes(self) -> npt.NDArray[Any]:
        """Room for codes: (1, pixels), or a row a label for the hinge."""
        wide = self.labelling.void > np.iinfo(np.uint8).max
        name, dtype = ("wide codes", np.int32) if wide else ("codes", np.uint8)
        return self._rows(name, dtype, self.channels if self.loss.is_hinge else 1)

    def run(self, loop: Callable[..., None], *arguments: Any, **options: Any) -> None:
        WORKERS.run(self.threads, loop, *arguments, **options)

    def run_blocks(self, loop: Callable[..., None], *arguments: Any) -> None:
        WORKERS.run(min(self.threads, len(self.blocks.image)), loop, self.blocks, self.images, *arguments)

    def per_image(self, counts: npt.NDArray[np.int64]) -> Tensor:
        """(images x K) to (K, images)."""
        return torch.from_numpy(counts.reshape(-1, self.channels).T.copy())

    def per_request(self, counts: npt.NDArray[np.int64]) -> Tensor:
        """(images x K) to (K, requests)."""
        sums = np.add.reduceat(counts.reshape(-1, self.channels), self.images_before, axis=0)
        return torch.from_numpy(sums.T.copy())

    def intersection_and_union(self) -> tuple[Tensor, Tensor]:
        labels, predictions, hits = map(self.per_request, self.counts[:3])
        return hits, labels + predictions - hits


@dataclass(frozen=True)
class _Groups:
    """The groups of a term: requests or images."""

    first_image: npt.NDArray[np.int64]
    last_image: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]
    pixels: npt.NDArray[np.int64]
    share: Tensor

    @classmethod
    def of(cls, batch: _Batch, *, per_image: bool) -> _Groups:
        images = batch.images
        if per_image:
            numbers = np.arange(len(images.start))
            share = np.repeat(1.0 / batch.request_images, batch.request_images)
            return cls(numbers, numbers + 1, images.start, images.pixels, torch.from_numpy(share))
        first = batch.images_before
        share = np.ones(len(first))
        return cls(
            first, first + batch.request_images, images.start[first], batch.request_pixels, torch.from_numpy(share)
        )


def _softmax(batch: _Batch, counted_from: Threshold) -> list[TermValues]:
    labelling, codes = batch.labelling, batch.codes()
    entropies = _entropies(batch)
    probability = batch.scratch.array("label probability", (batch.pixels,), np.float32)
    if batch.loss.probabilities:
        tolerance = np.float32(PROBABILITY_TOLERANCE)
        batch.run_blocks(
            softmax.prepare_probabilities,
            batch.logits_kind,
            labelling,
            tolerance,
            batch.errors,
            codes[0],
            batch.counts,
        )
    else:
        batch.run_blocks(
            softmax.prepare, batch.logits_kind, labelling, batch.errors, codes[0], probability, entropies, batch.counts
        )
    terms: list[TermValues] = []
    scored_images = np.zeros((len(batch.images.start), batch.channels), np.bool_)
    several, numbers = _prepare_grads(batch), itertools.count()
    for weight, term in batch.loss.terms:
        if isinstance(term, LovaszSoftmax):
            ignored = batch.ignored_code(term)
            counts = (batch.per_image if term.per_image else batch.per_request)(batch.counts.labels)
            if ignored != labelling.void:
                counts[ignored] = 0
            groups = _Groups.of(batch, per_image=term.per_image)
            scored, weights = score(term, weight, counts, groups.share)
            rules = Rules(labelling.void, ignored, False, batch.want_grad, several)
            losses = _score(batch, groups, scored, weights, counts, codes, rules, counted_from, None)
            terms.append(TermValues(losses, scored, term.per_image))
            _mark(scored_images, groups, scored)
        elif isinstance(term, CrossEntropy):
            terms.append(_cross_entropy(batch, weight, term, next(numbers), entropies))
    if batch.want_grad and batch.loss.probabilities:
        batch.clear_grads(scored_images)
    elif batch.want_grad:
        batch.run_blocks(softmax.finish, labelling, batch.errors, codes[0], probability, entropies, scored_images)
    return terms


def _hinge(batch: _Batch, counted_from: Threshold) -> list[TermValues]:
    labelling, codes, count = batch.labelling, batch.codes(), len(batch.counts.labels)
    valid, largest = np.zeros(count, np.int64), np.zeros(count, np.int64)
    batch.run_blocks(
        hinge.prepare, batch.logits_kind, batch.channels, labelling, batch.errors, codes, batch.counts, valid, largest
    )
    several = _prepare_grads(batch)
    scored_images = np.zeros((len(batch.images.start), batch.channels), np.bool_)
    terms = []
    for weight, term in batch.loss.terms:
        assert isinstance(term, LovaszHinge)
        ignored = batch.ignored_code(term)
        per_group = batch.per_image if term.per_image else batch.per_request
        foreground, counted = per_group(batch.counts.labels), per_group(valid)
        if ignored == 1:
            counted, foreground = counted - foreground, torch.zeros_like(foreground)
        elif ignored == 0:
            counted = foreground
        groups = _Groups.of(batch, per_image=term.per_image)
        scored, weights = score(term, weight, counted, groups.share)
        rules = Rules(labelling.void, ignored, True, batch.want_grad, several)
        bits = np.maximum.reduceat(largest.reshape(-1, batch.channels), groups.first_image, axis=0).T
        tops = np.maximum((bits >> 23) - 127, bins.LOWEST_TOP)
        losses = _score(batch, groups, scored, weights, foreground, codes, rules, counted_from, tops)
        terms.append(TermValues(losses, scored, term.per_image))
        _mark(scored_images, groups, scored)
    if batch.want_grad:
        batch.clear_grads(scored_images)
    return terms


def _score(
    batch: _Batch,
    groups: _Groups,
    scored: Tensor,
    weights: Tensor,
    foreground_counts: Tensor,
    codes: npt.NDArray[Any],
    rules: Rules,
    counted_from: Threshold,
    tops: npt.NDArray[np.int64] | None,
) -> Tensor:
    """Losses, shape (K, groups), and gradients of the scored segments of a term.

    Args:
        tops: (K, groups): the exponents of the largest errors; None for probabilities.
    """
    row, group = np.nonzero(scored.numpy())
    order = np.argsort(-groups.pixels[group], kind="stable")  # The largest first, so that threads end together.
    row, group = row[order], group[order]
    found = _segments(batch, groups, row, group, weights, foreground_counts, counted_from, tops)
    losses = np.zeros(len(row))
    pixels = found.stop - found.start
    fair = max(int(pixels.sum()) // (2 * batch.threads), bins.SORTED_BELOW_PIXELS)
    divided = (found.how == COUNTED) & (pixels > fair) & (batch.threads > 1)
    if divided.any():
        losses[divided] = _score_in_parts(batch, _pick(found, divided), fair, codes, rules)
    if not divided.all():
        losses[~divided] = _score_whole(batch, _pick(found, ~divided), codes, rules)
    of_groups = torch.zeros(scored.shape, dtype=torch.float64)
    of_groups.numpy()[row, group] = losses
    return of_groups


def _segments(
    batch: _Batch,
    groups: _Groups,
    row: npt.NDArray[np.int64],
    group: npt.NDArray[np.int64],
    weights: Tensor,
    foreground_counts: Tensor,
    counted_from: Threshold,
    tops: npt.NDArray[np.int64] | None,
) -> Segments:
    pixels, foreground = groups.pixels[group], foreground_counts.numpy()[row, group]
    counted = (pixels >= counted_from.pixels) & (foreground >= counted_from.foreground) & (pixels < bins.MAX_PIXELS)
    weight = weights.numpy()[row, group]
    is_hinge = batch.loss.is_hinge
    # The gradient in a probability or a logit; softmax's way back takes the sign into account itself.
    sign = -1.0 if is_hinge or batch.loss.probabilities else 1.0
    return Segments(
        how=np.where(foreground == 0, ABSENT, np.where(counted, COUNTED, SORTED)),
        row=row,
        code_row=row if is_hinge else np.zeros_like(row),
        foreground=np.ones_like(row) if is_hinge else row,
        foreground_count=foreground,
        first_image=groups.first_image[group],
        last_image=groups.last_image[group],
        start=groups.start[group],
        stop=groups.start[group] + pixels,
        top=np.full(len(row), bins.SOFTMAX_TOP) if tops is None else tops[row, group],
        weight=weight,
        foreground_weight=sign * weight,
    )


def _pick(found: Segments, which: npt.NDArray[np.bool_]) -> Segments:
    return found._replace(**{name: getattr(found, name)[which] for name in found._fields})


def _score_whole(batch: _Batch, found: Segments, codes: npt.NDArray[Any], rules: Rules) -> npt.NDArray[np.float64]:
    """Each segment in one thread."""
    threads = min(batch.threads, len(found.row))
    words = 2 * tables.BINS + 1 if (found.how == COUNTED).any() else 0
    largest = int((found.stop - found.start)[found.how != COUNTED].max(initial=0))
    table = batch.scratch.array("tables", (threads, words), np.int64, zero=True)
    keys = batch.scratch.array("keys", (2, threads, largest), np.uint64)
    room = batch.scratch.array("room", (threads, largest), np.float32)
    losses = np.zeros(len(found.row))
    WORKERS.run(
        threads,
        segments.score,
        found,
        rules,
        batch.images,
        batch.errors,
        codes,
        losses,
        own=lambda thread: (table[thread], keys[0, thread], keys[1, thread], room[thread]),
    )
    return losses


def _score_in_parts(
    batch: _Batch, found: Segments, part_pixels: int, codes: npt.NDArray[Any], rules: Rules
) -> npt.NDArray[np.float64]:
    """Counted segments that would keep one thread busy while others idle: each part in a table of its own."""
    pixels = found.stop - found.start
    per_segment = np.minimum(-(-pixels // part_pixels), batch.threads)
    segment = np.repeat(np.arange(len(pixels)), per_segment)
    firsts = np.cumsum(per_segment) - per_segment
    number = np.arange(len(segment)) - firsts[segment]
    edges = [found.start[segment] + pixels[segment] * n // per_segment[segment] for n in (number, number + 1)]
    parts = Parts(segment, *edges, *np.zeros((2, len(segment)), np.int64))
    shape = (len(segment), 2 * tables.BINS + 1)
    part_tables = batch.scratch.array("tables", shape, np.int64, zero=True)
    losses = np.zeros(len(pixels))
    batch.run(segments.count_parts, parts, found, rules, batch.errors, codes, part_tables)
    batch.run(segments.scan_parts, firsts, parts, found, losses, part_tables)
    if rules.want_grad:
        table = firsts[segment]
        batch.run(segments.look_up_parts, table, parts, found, rules, batch.images, batch.errors, codes, part_tables)
    for first in firsts:
        tables.clear(part_tables[first], parts.lowest[first], parts.highest[first])
    return losses


def _prepare_grads(batch: _Batch) -> bool:
    """Whether terms add their gradients up; these are 0 then."""
    several = sum(not isinstance(term, CrossEntropy) for _, term in batch.loss.terms) > 1
    if several and batch.want_grad:
        batch.clear_grads()
    return several


def _mark(scored_images: npt.NDArray[np.bool_], groups: _Groups, scored: Tensor) -> None:
    """Notes the rows (classes) of each image that have a gradient."""
    of_image = np.repeat(np.arange(len(groups.start)), groups.last_image - groups.first_image)
    scored_images |= scored.numpy().T[of_image]


def _entropies(batch: _Batch) -> CrossEntropies:
    """The cross-entropy terms, their factors still to be filled in."""
    terms = [term for _, term in batch.loss.terms if isinstance(term, CrossEntropy)]
    requests, void = len(batch.request_images), batch.labelling.void
    weights, counted = np.zeros((len(terms), void + 1), np.float32), np.zeros((len(terms), void + 1), np.float32)
    for t, term in enumerate(terms):
        weights[t, :void] = term.class_weights or 1.0
        counted[t, :void] = 1.0
        counted[t, batch.ignored_code(term)] = 0.0
    return CrossEntropies(
        weights=weights,
        counted=counted,
        smoothing=np.array([term.label_smoothing for term in terms], np.float32),
        losses=batch.scratch.array("pixel losses", (len(terms), batch.pixels), np.float32),
        largest=np.zeros(len(terms) * requests, np.int64),
        pull=np.zeros((len(terms), requests), np.float32),
        spread=np.zeros((len(terms), requests), np.float32),
    )


def _cross_entropy(batch: _Batch, weight: float, term: CrossEntropy, t: int, entropies: CrossEntropies) -> TermValues:
    """The loss of term number t: a mean over valid pixels, weighted; fills the term's factors in."""
    requests = len(batch.request_images)
    counts = batch.per_request(batch.counts.labels).numpy() * entropies.counted[t, :-1, None].astype(np.int64)
    class_weights = torch.tensor(term.class_weights or [1.0] * batch.channels, dtype=torch.float64)
    total = sum_over_classes(torch.from_numpy(counts).to(torch.float64) * class_weights.unsqueeze(1)).numpy()
    scale = np.divide(1.0, total, out=np.zeros(requests), where=total > 0)
    # A request's sum is at most its largest term times the number of its pixels.
    largest = entropies.largest[t * requests : (t + 1) * requests].astype(np.int32).view(np.float32)
    exponents = np.frexp(np.where(np.isfinite(largest), largest, 0.0).astype(np.float64) * batch.request_pixels)[1]
    units = np.ldexp(1.0, np.minimum(_FIXED_POINT_BITS - exponents, 1000))
    sums = np.zeros(requests, np.int64)
    batch.run_blocks(softmax.add_losses, entropies.losses[t], units, sums)
    entropies.pull[t] = weight * (1 - term.label_smoothing) * scale
    entropies.spread[t] = weight * term.label_smoothing / batch.channels * scale
    losses = torch.from_numpy(sums / units * scale).unsqueeze(0)
    return TermValues(losses, torch.ones_like(losses, dtype=torch.bool), per_image=False)
