"""The path of the CPU: loops compiled by Numba over pixels as they stand in the requests, nothing copied.

Four steps, each in parallel: errors and counts from logits and labels; cross-entropy's sums; the segments of each
Lovász term (docs/mathematics.md, sections 7 and 11); the way back through softmax, in place.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lovasz.core import bins
from lovasz.core.backends.numba import hinge, segments, softmax, tables
from lovasz.core.backends.numba.batch import Groups, NumbaBatch
from lovasz.core.backends.numba.cross_entropy import CrossEntropies, add_losses
from lovasz.core.backends.numba.scratch import SCRATCH
from lovasz.core.backends.numba.segments import ABSENT, COUNTED, SORTED, Parts, Rules, Segments
from lovasz.core.backends.torch.softmax import sum_over_classes
from lovasz.core.batch import Batch
from lovasz.core.computed import PROBABILITY_TOLERANCE, Computed, TermTensors, later, score
from lovasz.core.stop import Stop
from lovasz.spec import CrossEntropy, LovaszHinge, LovaszSoftmax, WeightedSum

_FIXED_POINT_BITS = 60


class Threshold(NamedTuple):
    """Which segments are counted in tables: those of at least so many pixels, and pixels of foreground.

    Attributes:
        order_error: hinge segments whose tables leave more error than this (``tables.order_error``) are sorted.
    """

    pixels: int
    foreground: int
    order_error: float


def compute(
    batch: Batch,
    loss: WeightedSum,
    *,
    want_grad: bool,
    counted_from: Threshold,
    stop: Stop | None = None,
) -> Computed:
    """Computes a batch (of 16 or 32 bits).

    Args:
        counted_from: segments below this are sorted.

    Raises:
        Stopped: it was asked to end early.
    """
    with SCRATCH.borrow() as scratch:
        planes = NumbaBatch(batch, loss, scratch, want_grad=want_grad, stop=stop)
        terms = _hinge(planes, counted_from) if loss.is_hinge else _softmax(planes, counted_from)
    intersection, union = planes.intersection_and_union()
    grads = planes.grads() if want_grad else None
    faults = torch.from_numpy(planes.counts.faults.reshape(3, -1))
    return Computed(grads, later(terms, intersection, union, faults))


def _softmax(batch: NumbaBatch, counted_from: Threshold) -> list[TermTensors]:
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
    terms: list[TermTensors] = []
    scored_images = np.zeros((len(batch.images.start), batch.channels), np.bool_)
    several, numbers = _prepare_grads(batch), itertools.count()
    for weight, term in batch.loss.terms:
        if isinstance(term, LovaszSoftmax):
            ignored = batch.ignored_code(term)
            counts = (batch.per_image if term.per_image else batch.per_joint)(batch.counts.labels)
            if ignored != labelling.void:
                counts[ignored] = 0
            groups = Groups.of(batch, per_image=term.per_image)
            scored, weights = score(term, weight, counts, groups.share)
            rules = Rules(labelling.void, ignored, False, batch.want_grad, several, math.inf)
            losses = _score(batch, groups, scored, weights, counts, codes, rules, counted_from, None)
            terms.append(TermTensors(losses, scored, term.per_image))
            _mark(scored_images, groups, scored)
        elif isinstance(term, CrossEntropy):
            terms.append(_cross_entropy(batch, weight, term, next(numbers), entropies))
    if batch.want_grad and batch.loss.probabilities:
        batch.clear_grads(scored_images)
    elif batch.want_grad:
        batch.run_blocks(softmax.finish, labelling, batch.errors, codes[0], probability, entropies, scored_images)
    return terms


def _hinge(batch: NumbaBatch, counted_from: Threshold) -> list[TermTensors]:
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
        per_group = batch.per_image if term.per_image else batch.per_joint
        foreground, counted = per_group(batch.counts.labels), per_group(valid)
        if ignored == 1:
            counted, foreground = counted - foreground, torch.zeros_like(foreground)
        elif ignored == 0:
            counted = foreground
        groups = Groups.of(batch, per_image=term.per_image)
        scored, weights = score(term, weight, counted, groups.share)
        rules = Rules(labelling.void, ignored, True, batch.want_grad, several, counted_from.order_error)
        bits = np.maximum.reduceat(largest.reshape(-1, batch.channels), groups.first_image, axis=0).T
        tops = np.maximum((bits >> 23) - 127, bins.LOWEST_TOP)
        losses = _score(batch, groups, scored, weights, foreground, codes, rules, counted_from, tops)
        terms.append(TermTensors(losses, scored, term.per_image))
        _mark(scored_images, groups, scored)
    if batch.want_grad:
        batch.clear_grads(scored_images)
    return terms


def _score(
    batch: NumbaBatch,
    groups: Groups,
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
    batch: NumbaBatch,
    groups: Groups,
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


def _score_whole(batch: NumbaBatch, found: Segments, codes: npt.NDArray[Any], rules: Rules) -> npt.NDArray[np.float64]:
    """Each segment in one thread."""
    threads = min(batch.threads, len(found.row))
    words = 2 * tables.BINS + 1 if (found.how == COUNTED).any() else 0
    may_be_sorted = (found.how != COUNTED) | (rules.most_order_error < math.inf)
    largest = int((found.stop - found.start)[may_be_sorted].max(initial=0))
    table = batch.scratch.array("tables", (threads, words), np.int64, zero=True)
    keys = batch.scratch.array("keys", (2, threads, largest), np.uint64)
    room = batch.scratch.array("room", (threads, largest), np.float32)
    losses = np.zeros(len(found.row))
    batch.run(
        segments.score,
        found,
        rules,
        batch.images,
        batch.errors,
        codes,
        losses,
        threads=threads,
        own=lambda thread: (table[thread], keys[0, thread], keys[1, thread], room[thread]),
    )
    return losses


def _score_in_parts(
    batch: NumbaBatch, found: Segments, part_pixels: int, codes: npt.NDArray[Any], rules: Rules
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
    is_fine = np.ones(len(pixels), np.bool_)
    batch.run(segments.scan_parts, firsts, parts, found, rules, losses, is_fine, part_tables)
    if rules.want_grad:
        inputs = parts, found, rules, batch.images, batch.errors, codes, is_fine, part_tables
        batch.run(segments.look_up_parts, firsts[segment], *inputs)
    for first in firsts:
        tables.clear(part_tables[first], parts.lowest[first], parts.highest[first])
    if not is_fine.all():
        others = _pick(found, ~is_fine)
        losses[~is_fine] = _score_whole(batch, others._replace(how=np.full_like(others.how, SORTED)), codes, rules)
    return losses


def _prepare_grads(batch: NumbaBatch) -> bool:
    """Whether terms add their gradients up; these are 0 then."""
    several = sum(not isinstance(term, CrossEntropy) for _, term in batch.loss.terms) > 1
    if several and batch.want_grad:
        batch.clear_grads()
    return several


def _mark(scored_images: npt.NDArray[np.bool_], groups: Groups, scored: Tensor) -> None:
    """Notes the rows (classes) of each image that have a gradient."""
    of_image = np.repeat(np.arange(len(groups.start)), groups.last_image - groups.first_image)
    scored_images |= scored.numpy().T[of_image]


def _entropies(batch: NumbaBatch) -> CrossEntropies:
    """The cross-entropy terms, their factors still to be filled in."""
    terms = [term for _, term in batch.loss.terms if isinstance(term, CrossEntropy)]
    joints, void = len(batch.joint_images), batch.labelling.void
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
        largest=np.zeros(len(terms) * joints, np.int64),
        pull=np.zeros((len(terms), joints), np.float32),
        spread=np.zeros((len(terms), joints), np.float32),
    )


def _cross_entropy(
    batch: NumbaBatch, weight: float, term: CrossEntropy, t: int, entropies: CrossEntropies
) -> TermTensors:
    """The loss of term number t: a mean over valid pixels, weighted; fills the term's factors in."""
    joints = len(batch.joint_images)
    counts = batch.per_joint(batch.counts.labels).numpy() * entropies.counted[t, :-1, None].astype(np.int64)
    class_weights = torch.tensor(term.class_weights or [1.0] * batch.channels, dtype=torch.float64)
    total = sum_over_classes(torch.from_numpy(counts).to(torch.float64) * class_weights.unsqueeze(1)).numpy()
    scale = np.divide(1.0, total, out=np.zeros(joints), where=total > 0)
    # A joint's sum is at most its largest term times the number of its pixels.
    largest = entropies.largest[t * joints : (t + 1) * joints].astype(np.int32).view(np.float32)
    exponents = np.frexp(np.where(np.isfinite(largest), largest, 0.0).astype(np.float64) * batch.joint_pixels)[1]
    units = np.ldexp(1.0, np.minimum(_FIXED_POINT_BITS - exponents, 1000))
    sums = np.zeros(joints, np.int64)
    batch.run_blocks(add_losses, entropies.losses[t], units, sums)
    entropies.pull[t] = weight * (1 - term.label_smoothing) * scale
    entropies.spread[t] = weight * term.label_smoothing / batch.channels * scale
    losses = torch.from_numpy(sums / units * scale).unsqueeze(0)
    return TermTensors(losses, torch.ones_like(losses, dtype=torch.bool), per_image=False)
