"""Large segments few of whose pixels matter: threads select their keys in strips of pixels, and sort them in ranges."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from lovasz.core.backends.numba import selecting, sorting
from lovasz.core.backends.numba.call import Call
from lovasz.core.backends.numba.intrinsics import compiled, pointer
from lovasz.core.backends.numba.keys import Keys, renumber
from lovasz.core.backends.numba.planes import Floats, Integers, Planes, claim
from lovasz.core.backends.numba.segments import Rules, Segments

STRIP_PIXELS = 1 << 14
"""Pixels per task of the selection."""

RANGE_KEYS = 1 << 17
"""About the most keys that are sorted at a time: they, and the memory that they are moved to, take two megabytes."""

MOST_PIXELS = 1 << 23
"""The most pixels of a segment, and about the most of those that are sorted at a time: each takes up to 24 bytes."""

_SAMPLES = 4
"""The keys of a strip that are looked at to divide the keys of its segment into ranges."""
_LARGEST_KEY = np.uint64(np.iinfo(np.uint64).max)


class Strips(NamedTuple):
    """Tasks of a loop, one element per strip of pixels; the strips of a segment are consecutive.

    Attributes:
        segment: the segment of the strip.
        first: the first strip of this segment.
        start, stop: its pixels in the row are [start, stop).
        count: written: the number of its keys.
    """

    segment: Integers
    first: Integers
    start: Integers
    stop: Integers
    count: Integers


class Ranges(NamedTuple):
    """Tasks of a loop, one element per range of a segment's keys; the ranges of a segment are consecutive.

    Attributes:
        segment: the segment of the range.
        first_strip, stop_strip: the strips of this segment are [first_strip, stop_strip).
        low, high: its keys are in [low, high).
        place: the place in ``losses`` of the segment's first key.
    """

    segment: Integers
    first_strip: Integers
    stop_strip: Integers
    low: Keys
    high: Keys
    place: Integers


def sort_in_ranges(call: Call, found: Segments, codes: npt.NDArray[np.uint8], rules: Rules) -> npt.NDArray[np.float64]:
    """Scores segments of a loss with ``rules.cut``; returns their losses.

    Gradients and losses have the bits of ``sorting.extension``.
    """
    portion = np.cumsum(found.stop - found.start) // MOST_PIXELS
    portions = [Segments(*(column[portion == number] for column in found)) for number in np.unique(portion)]
    return np.concatenate([_sort_portion(call, some, codes, rules) for some in portions])


def _sort_portion(call: Call, found: Segments, codes: npt.NDArray[np.uint8], rules: Rules) -> npt.NDArray[np.float64]:
    strips = Strips(*_cut(found.start, found.stop))
    keys = call.scratch.array("keys of strips", (len(strips.segment), STRIP_PIXELS), np.uint64)
    places = call.scratch.array("places of keys", (len(strips.segment), STRIP_PIXELS), np.uint16)
    g = call.scratch.array("gradients of keys", (places.size if rules.want_grad else 0,), np.float32)
    of_strips: dict[str, Any] = {"strips": strips, "segments": found, "rules": rules, "places": places}
    call.run(select, errors=call.errors, codes=codes, keys=keys, **of_strips)
    ends = np.zeros(len(found.row) + 1, np.int64)
    ranges = Ranges(*_divide(strips, keys, ends, RANGE_KEYS, call.threads))
    memory = call.scratch.array("keys of ranges", (2, int(ends[-1])), np.uint64)
    losses = call.scratch.array("losses of keys", (int(ends[-1]),), np.float64)
    of_keys: dict[str, Any] = {"keys": keys, "own_keys": memory[0], "other_keys": memory[1]}
    call.run(rank, ranges=ranges, counts=strips.count, segments=found, losses=losses, g=g, **of_keys)
    sums = np.empty(len(found.row))
    call.run(write, planes=call.planes, g=g, losses=losses, ends=ends, sums=sums, **of_strips)
    return sums


@compiled
def _cut(start: Integers, stop: Integers) -> tuple[Integers, Integers, Integers, Integers, Integers]:
    """The columns of the strips of segments with the pixels [start, stop); their keys are not counted yet."""
    number = 0
    for s in range(len(start)):
        number += -(-(stop[s] - start[s]) // STRIP_PIXELS)
    segment, firsts, starts, stops, count = (
        np.empty(number, np.int64),
        np.empty(number, np.int64),
        np.empty(number, np.int64),
        np.empty(number, np.int64),
        np.zeros(number, np.int64),
    )
    strip = 0
    for s in range(len(start)):
        first = strip
        for begin in range(start[s], stop[s], STRIP_PIXELS):
            segment[strip], firsts[strip] = s, first
            starts[strip], stops[strip] = begin, min(begin + STRIP_PIXELS, stop[s])
            strip += 1
    return segment, firsts, starts, stops, count


@compiled
def _divide(
    strips: Strips, keys: npt.NDArray[np.uint64], ends: Integers, range_keys: int, threads: int
) -> tuple[Integers, Integers, Integers, Keys, Keys, Integers]:
    """The columns of the ranges of all segments.

    Args:
        ends: one element per segment and one more, 0; written: ``losses`` has those of segment i in [ends[i],
            ends[i + 1]).
        range_keys: about the most keys of a range.
    """
    segments, strip = len(ends) - 1, 0
    for i in range(len(strips.segment)):
        ends[strips.segment[i] + 1] += strips.count[i]
    for s in range(segments):
        ends[s + 1] += ends[s]
    least = threads if segments < threads else 1
    most = ends[segments] // range_keys + segments * (least + 1)
    segment, first_strip, stop_strip, place = (
        np.empty(most, np.int64),
        np.empty(most, np.int64),
        np.empty(most, np.int64),
        np.empty(most, np.int64),
    )
    low, high = np.empty(most, np.uint64), np.empty(most, np.uint64)
    number = 0
    for s in range(segments):
        first = strip
        while strip < len(strips.segment) and strips.segment[strip] == s:
            strip += 1
        wanted = max(-(-(ends[s + 1] - ends[s]) // range_keys), least)
        inner = _quantiles(keys[first:strip], strips.count[first:strip], wanted)
        for i in range(len(inner) + 1):
            segment[number], first_strip[number], stop_strip[number], place[number] = s, first, strip, ends[s]
            low[number] = inner[i - 1] if i > 0 else np.uint64(0)
            high[number] = inner[i] if i < len(inner) else _LARGEST_KEY
            number += 1
    return segment[:number], first_strip[:number], stop_strip[:number], low[:number], high[:number], place[:number]


@compiled
def _quantiles(keys: npt.NDArray[np.uint64], counts: Integers, number: int) -> Keys:
    """Keys that divide those of a segment's strips into so many ranges of about the same size; none without keys."""
    sample, weights = np.empty(len(counts) * _SAMPLES, np.uint64), np.empty(len(counts) * _SAMPLES, np.int64)
    n, total = 0, 0
    for strip in range(len(counts)):
        for i in range(_SAMPLES if counts[strip] > 0 else 0):
            sample[n], weights[n] = keys[strip, counts[strip] * i // _SAMPLES], counts[strip]
            n, total = n + 1, total + counts[strip]
    order = np.argsort(sample[:n])
    found, below, j = np.empty(number - 1 if n > 0 else 0, np.uint64), 0, 0
    for i in range(len(found)):
        while below + weights[order[j]] < total * (i + 1) // number:
            below, j = below + weights[order[j]], j + 1
        found[i] = sample[order[j]]
    return found


@compiled
def select(
    tasks: Integers,
    strips: Strips,
    segments: Segments,
    rules: Rules,
    errors: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    keys: npt.NDArray[np.uint64],
    places: npt.NDArray[np.uint16],
) -> None:
    """Writes the keys of each strip's errors above 0, and their places in the strip.

    The position in a key becomes its place among the keys of the segment, as if each strip had ``STRIP_PIXELS`` keys.
    So the order stays that of the pixels, and the gradients of keys lie closer together than those of pixels.
    """
    while True:
        task = claim(tasks, len(strips.segment))
        if task >= len(strips.segment):
            break
        s, start, stop = strips.segment[task], strips.start[task], strips.stop[task]
        own, place = keys[task], places[task]
        kept = selecting.select(
            errors[segments.row[s], start:stop],
            codes[segments.code_row[s], start:stop],
            segments.foreground[s],
            rules.void,
            rules.ignored,
            0,
            True,
            own,
        )
        renumber(own[:kept], (task - strips.first[task]) * STRIP_PIXELS, place)
        strips.count[task] = kept


@compiled
def rank(
    tasks: Integers,
    ranges: Ranges,
    counts: Integers,
    segments: Segments,
    keys: npt.NDArray[np.uint64],
    own_keys: Keys,
    other_keys: Keys,
    losses: npt.NDArray[np.float64],
    g: Floats,
) -> None:
    """Sorts the keys of each range; writes their gradients, and what each adds to the loss.

    Args:
        counts: the number of keys of each strip.
        own_keys, other_keys: memory for the keys of all ranges.
        g: written: the gradient of each key, ``STRIP_PIXELS`` elements for each strip.
    """
    while True:
        task = claim(tasks, len(ranges.segment))
        if task >= len(ranges.segment):
            break
        s, low, high = ranges.segment[task], ranges.low[task], ranges.high[task]
        before, foreground_before = 0, 0
        for strip in range(ranges.first_strip[task], ranges.stop_strip[task]):
            count, foreground = selecting.count_before(keys[strip, : counts[strip]], low)
            before, foreground_before = before + count, foreground_before + foreground
        place = ranges.place[task] + before
        own, other = own_keys[place:], other_keys[place:]
        kept = 0
        for strip in range(ranges.first_strip[task], ranges.stop_strip[task]):
            kept += selecting.select_range(keys[strip, : counts[strip]], low, high, own[kept:])
        in_order, _ = sorting.sort(own[:kept], other[:kept])
        sorting.rank(
            in_order,
            before,
            foreground_before,
            segments.foreground_count[s],
            segments.weight[s],
            segments.foreground_weight[s],
            True,
            losses[place : place + kept],
            g[ranges.first_strip[task] * STRIP_PIXELS :],
        )


@compiled
def write(
    tasks: Integers,
    strips: Strips,
    segments: Segments,
    rules: Rules,
    planes: Planes,
    places: npt.NDArray[np.uint16],
    g: Floats,
    losses: npt.NDArray[np.float64],
    ends: Integers,
    sums: npt.NDArray[np.float64],
) -> None:
    """Adds up the losses of each segment's keys; writes the gradient of its pixels: that of the keys, and 0 elsewhere.

    Args:
        ends: those of ``_divide``.
        sums: written, one element per segment.
    """
    number = len(sums) + (len(strips.segment) if rules.want_grad else 0)
    while True:
        task = claim(tasks, number)
        if task >= number:
            break
        if task < len(sums):
            sums[task] = _sum(losses[ends[task] : ends[task + 1]])
            continue
        strip = task - len(sums)
        s, start, stop, count, j = (
            strips.segment[strip],
            strips.start[strip],
            strips.stop[strip],
            strips.count[strip],
            0,
        )
        place, own = places[strip, :count], g[strip * STRIP_PIXELS : strip * STRIP_PIXELS + count]
        for plane in range(segments.first_plane[s], segments.stop_plane[s]):
            plane_start, pixels = planes.start[plane], planes.pixels[plane]
            low, high = max(start, plane_start), min(stop, plane_start + pixels)
            if low >= high:
                continue
            address = planes.grads[plane] + np.uint64(4 * pixels * segments.row[s])
            grads = numba.carray(pointer(address), (pixels,), np.float32)[low - plane_start : high - plane_start]
            for i in range(0 if rules.add else len(grads)):
                grads[i] = np.float32(0)
            while j < count and start + place[j] < high:
                grads[start + place[j] - low] += own[j]
                j += 1


@compiled
def _sum(losses: npt.NDArray[np.float64]) -> float:
    """Adds up as many losses as ``sorting.extension`` does: not those of the background after the last foreground."""
    n = len(losses)
    while n > 0 and losses[n - 1] == 0.0:
        n -= 1
    return float(sorting.sum_of_losses(losses[:n]))
