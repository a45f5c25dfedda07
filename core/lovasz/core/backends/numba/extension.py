"""Scores the segments of a Lovász term: decides which are sorted and which counted in tables, and runs the loops."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lovasz.core.backends.numba import divided, joint_segments, ranges, tables, undivided
from lovasz.core.backends.numba.bins import BINARY_COARSER, FINE_TOP, HIGHEST_TOP, LOWEST_TOP, SOFTMAX_COARSER
from lovasz.core.backends.numba.call import Call
from lovasz.core.backends.numba.keys import MOST
from lovasz.core.backends.numba.segments import Rules, Segments, WindowRules
from lovasz.core.plan import Term
from lovasz.core.ranks import Ranks
from lovasz.core.word import MAX_PIXELS

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


SORTED_BELOW_PIXELS, LARGE_PIXELS = 3 << 15, 1 << 18
"""From so many pixels of a segment on, counting is faster than sorting, as measured on a CPU, if most of them, or more
than a few, come before its last foreground."""
MIDDLE_SHIFT, LARGE_SHIFT = 1, 3
"""A segment is sorted if at most one in 2^shift of its pixels does: one that is not large, and a large one."""
MIDDLE_CAUTION = 0.85
"""The factor of ``Thresholds.window_error`` for segments that are not large, whose errors vary more."""


class Thresholds(NamedTuple):
    """Limits that decide which segments are counted in tables; the others are sorted.

    Attributes:
        pixels: a segment with fewer pixels is sorted.
        window: the most pixels of a counted segment that are sorted; if 0, there are no windows.
        window_error: ``Segments.most_error`` of large segments.
        positive: a segment of the hinge is sorted if at most this share of its pixels have errors above 0.
        whole: a joint with more logits is computed by all threads, step by step.
        thread: a batch is computed by at most one thread for so many of its logits.
        divided: a segment with at most so many pixels is counted by one thread.
        large: ``MIDDLE_SHIFT`` and ``MIDDLE_CAUTION`` are for segments with fewer pixels.
        ranges: a segment of the hinge with fewer pixels is sorted by one thread, one with more by all of them.
    """

    pixels: int
    positive: float
    whole: int
    window: int = 0
    window_error: float = 1.7e-5
    thread: int = 1
    divided: int = LARGE_PIXELS
    large: int = 0
    ranges: int = 0


class ErrorScale(NamedTuple):
    """What is known of the errors of a binary loss: int64, (K, groups); of all ranks for a joint.

    Attributes:
        largest: the bits of each segment's largest error.
        positive: how many of its errors are above 0.
    """

    largest: npt.NDArray[np.int64]
    positive: npt.NDArray[np.int64]


THRESHOLDS = Thresholds(
    pixels=SORTED_BELOW_PIXELS,
    # Selecting takes a third of the time of counting, and sorting a pixel four times that of counting it.
    positive=0.25,
    whole=1 << 19,
    window=1 << 17,
    # They take a third of a millisecond. To wake a thread takes up to a tenth, and a batch has several loops.
    thread=1 << 16,
    large=LARGE_PIXELS,
    # A thread alone does not go through the keys a second time, to find those of a range.
    ranges=1 << 20,
)
MOST_TABLES = 8
"""The most segments that are counted in parts at a time: the table of each part takes 4 MB."""
MOST_JOINT_TABLES = 24
"""The same if other ranks have pixels of the segments: for each portion, all ranks wait for each other twice."""
SORT_ALL = Thresholds(pixels=MAX_PIXELS, positive=0.0, whole=0)
COUNT_ALL = Thresholds(pixels=0, positive=0.0, whole=0)
AS_LARGE = THRESHOLDS._replace(pixels=0, window=8, whole=0, thread=1, divided=1, large=0, ranges=0)
"""Batches of any size are computed as large ones are."""


def score_term(
    call: Call,
    term: Term,
    scored: Flags,
    weights: Floats,
    foreground: npt.NDArray[np.int64],
    codes: npt.NDArray[Any],
    add: bool,
    thresholds: Thresholds,
    scale: ErrorScale | None = None,
    nearest: npt.NDArray[np.int64] | None = None,
) -> Floats:
    """Computes the losses of a term's scored segments, and their gradients.

    Args:
        scored, weights: the results of ``select_segments``, shape (K, groups).
        foreground: the foreground pixels of each segment, shape (K, groups); those of all ranks for a joint.
        add: whether gradients are added to those of other terms.
        scale: None for softmax, whose errors are at most 1.
        nearest: ``Counts.nearest`` of each segment, shape (K, groups); None: it is not known.

    Returns:
        The losses: float64, shape (K, groups), 0 for segments that are not scored.
    """
    outline, of_groups = call.outline.of_term(term), np.zeros(scored.shape)
    found, places = outline.segments, outline.places
    if not scored.all():
        which = scored.take(places)
        found, places = _pick(found, which), places[which]
        if len(places) == 0:
            return of_groups
    ranks, is_binary, weight = None if term.per_image else call.ranks, call.plan.is_binary, weights.take(places)
    # Gradients are with respect to probabilities, or the margins of binary losses; for softmax, the backward pass
    # applies the sign.
    is_negative = is_binary or call.plan.loss.probabilities
    fine_top = np.full_like(places, FINE_TOP) if scale is None else _tops(scale.largest.take(places))
    windows = WindowRules(
        is_bounded=not is_binary or call.plan.is_sigmoid,
        is_weighed=call.plan.is_sigmoid or not (is_binary or call.plan.loss.probabilities),
        most=thresholds.window,
        must_suffice=is_binary,
    )
    coarser = BINARY_COARSER if is_binary else SOFTMAX_COARSER
    found = found._replace(
        foreground_count=foreground.take(places),
        top=np.minimum(fine_top + coarser, HIGHEST_TOP) if windows.most > 0 else fine_top,
        fine_top=fine_top,
        weight=weight,
        foreground_weight=0.0 - weight if is_negative else weight,  # Not -0.0.
    )
    if nearest is not None:
        found = found._replace(smallest=MOST - nearest.take(places))
    cut = is_binary and not call.plan.is_sigmoid
    keep = call.want_grad and not add and not call.errors_are_in_grads
    rules = Rules(call.outline.labelling.void, outline.ignored, cut, call.want_grad, add, keep, windows)
    if ranks is None and outline.largest < thresholds.pixels:
        losses = _score_whole(call, found, codes, rules, outline.largest)
    else:
        positive = scale.positive.take(places) if scale is not None and cut else None
        losses = _score_large(call, ranks, found, codes, rules, thresholds, positive)
    of_groups.put(places, losses)
    return of_groups


def _score_large(
    call: Call,
    ranks: Ranks | None,
    found: Segments,
    codes: npt.NDArray[Any],
    rules: Rules,
    thresholds: Thresholds,
    positive: npt.NDArray[np.int64] | None,
) -> Floats:
    """Scores segments some of which may be counted.

    Args:
        positive: how many errors of each segment are above 0, for the hinge; others have the gradient 0.
    """
    pixels = found.stop - found.start
    of_all = pixels if ranks is None else np.full_like(pixels, sum(ranks.pixels))
    enough = (of_all >= thresholds.pixels) & (of_all < MAX_PIXELS)
    counted = enough & (found.foreground_count > 0)
    is_mostly_zero = np.zeros_like(counted)
    if positive is not None:
        is_mostly_zero = counted & (positive <= thresholds.positive * of_all) & (of_all <= ranges.MOST_PIXELS)
    is_middle, window_error = of_all < thresholds.large, thresholds.window_error
    found = found._replace(
        counted=counted & ~is_mostly_zero,
        few=_few(rules.windows, of_all, is_middle),
        most_error=np.where(is_middle, MIDDLE_CAUTION * window_error, window_error),
    )
    in_ranges = is_mostly_zero & (ranks is None) & (of_all >= thresholds.ranges)
    fair = max(int(pixels.sum()) // (2 * call.threads), thresholds.divided)
    in_parts = found.counted & ((pixels > fair) & (call.threads > 1) | (ranks is not None))
    others = ~(in_ranges | in_parts)
    if others.all():
        return _score_others(call, ranks, found, codes, rules)
    losses = np.zeros(len(pixels))
    if in_ranges.any():
        losses[in_ranges] = ranges.sort_in_ranges(call, _pick(found, in_ranges), codes, rules)
    for some in _portions(in_parts, MOST_TABLES if ranks is None else MOST_JOINT_TABLES):
        losses[some] = _score_in_parts(call, ranks, _pick(found, some), fair, codes, rules)
    if others.any():
        losses[others] = _score_others(call, ranks, _pick(found, others), codes, rules)
    return losses


def _score_in_parts(
    call: Call, ranks: Ranks | None, found: Segments, part_pixels: int, codes: npt.NDArray[Any], rules: Rules
) -> Floats:
    """Scores segments that are counted in parts: in finer bins, or by sorting, where that is not exact enough."""
    losses, is_fine = divided.score(call, ranks, found, part_pixels, codes, rules)
    if is_fine.all():
        return losses
    rest = _pick(found, ~is_fine)
    if (rest.top > rest.fine_top).any():
        losses[~is_fine] = _score_in_parts(call, ranks, rest._replace(top=rest.fine_top), part_pixels, codes, rules)
    else:
        losses[~is_fine] = _score_others(call, ranks, rest._replace(counted=np.zeros_like(rest.counted)), codes, rules)
    return losses


def _few(windows: WindowRules, pixels: npt.NDArray[np.int64], is_middle: Flags) -> npt.NDArray[np.int64]:
    """``Segments.few`` of segments with so many pixels."""
    if windows.most == 0:
        return np.full_like(pixels, -1)
    shift = np.where(is_middle, MIDDLE_SHIFT, LARGE_SHIFT)
    return np.minimum(pixels >> shift, windows.most)


def _tops(bits: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The top exponents of tables, from the bits of their largest errors."""
    return np.maximum((bits >> 23) - 127, LOWEST_TOP)


def _pick(found: Segments, which: npt.NDArray[Any]) -> Segments:
    columns: tuple[Any, ...] = found
    return Segments(*(column[which] for column in columns))


def _portions(which: Flags, most: int) -> list[npt.NDArray[np.int64]]:
    """The positions of the flags that are true, in portions of at most so many."""
    places = np.flatnonzero(which)
    return [places[first : first + most] for first in range(0, len(places), most)]


def _score_others(call: Call, ranks: Ranks | None, found: Segments, codes: npt.NDArray[Any], rules: Rules) -> Floats:
    """Scores segments that are not counted in parts."""
    if ranks is None:
        return _score_whole(call, found, codes, rules)
    return joint_segments.sort_sent(call, ranks, found, codes, rules)


def _score_whole(call: Call, found: Segments, codes: npt.NDArray[Any], rules: Rules, largest: int = 0) -> Floats:
    """Scores each segment in one thread.

    Args:
        largest: the pixels of the largest segment if none is counted; else 0.
    """
    threads, words, most = min(call.threads, len(found.row)), 0, 0
    most_keys = largest
    if largest == 0:
        pixels, may_be_sorted = found.stop - found.start, ~found.counted | rules.windows.must_suffice
        words, most = tables.WORDS if found.counted.any() else 0, rules.windows.most
        largest = max(int(pixels[may_be_sorted].max(initial=0)), most)
        most_keys = max(int(pixels[may_be_sorted & (found.foreground_count > 0)].max(initial=0)), most)
    table = call.scratch.array("tables", (threads, words), np.int64, zero=True)
    keys = call.scratch.array("keys", (2, threads, most_keys), np.uint64)
    # Twice a window: a segment is sorted as a whole if at most half of its pixels, and no more than a window, matter.
    room = call.scratch.array("room", (threads, max(largest, 2 * most)), np.float32)
    values = call.scratch.array("window values", (threads, most), np.float32)
    places = call.scratch.array("window places", (threads, most), np.int32)
    losses = np.zeros(len(found.row))
    call.run(
        undivided.score,
        threads=threads,
        segments=found,
        rules=rules,
        planes=call.planes,
        errors=call.errors,
        codes=codes,
        losses=losses,
        own=lambda thread: {
            "table": table[thread],
            "keys": keys[0, thread],
            "other_keys": keys[1, thread],
            "room": room[thread],
            "values": values[thread],
            "places": places[thread],
        },
    )
    return losses
