"""Large segments few of whose pixels matter: threads select their keys in strips of pixels, and sort them in ranges."""

from __future__ import annotations

from itertools import pairwise
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
_LARGEST_KEY = np.iinfo(np.uint64).max


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
    strips = _strips(found)
    keys = call.scratch.array("keys of strips", (len(strips.segment), STRIP_PIXELS), np.uint64)
    places = call.scratch.array("places of keys", (len(strips.segment), STRIP_PIXELS), np.uint16)
    g = call.scratch.array("gradients of keys", (places.size if rules.want_grad else 0,), np.float32)
    of_strips: dict[str, Any] = {"strips": strips, "segments": found, "rules": rules, "places": places}
    call.run(select, errors=call.errors, codes=codes, keys=keys, **of_strips)
    ranges, ends = _ranges(strips, keys, len(found.row), call.threads)
    memory = call.scratch.array("keys of ranges", (2, int(ends[-1])), np.uint64)
    losses = call.scratch.array("losses of keys", (int(ends[-1]),), np.float64)
    of_keys: dict[str, Any] = {"keys": keys, "own_keys": memory[0], "other_keys": memory[1]}
    call.run(rank, ranges=ranges, counts=strips.count, segments=found, losses=losses, g=g, **of_keys)
    if rules.want_grad:
        call.run(write, planes=call.planes, g=g, **of_strips)
    # Without the background after the last foreground, whose losses are 0: as many as ``extension`` adds up.
    return np.array([sorting.sum_of_losses(own[: np.count_nonzero(own)]) for own in np.split(losses, ends[:-1])])


def _strips(found: Segments) -> Strips:
    pixels = found.stop - found.start
    per_segment = -(-pixels // STRIP_PIXELS)
    segment = np.repeat(np.arange(len(pixels)), per_segment)
    first = np.repeat(np.cumsum(per_segment) - per_segment, per_segment)
    start = found.start[segment] + (np.arange(len(segment)) - first) * STRIP_PIXELS
    return Strips(segment, first, start, np.minimum(start + STRIP_PIXELS, found.stop[segment]), np.zeros_like(start))


def _ranges(strips: Strips, keys: npt.NDArray[np.uint64], segments: int, threads: int) -> tuple[Ranges, Integers]:
    """The ranges of all segments, and the place in ``losses`` where the keys of each segment end."""
    edges = np.searchsorted(strips.segment, np.arange(segments + 1))
    ends = np.array([strips.count[first:stop].sum() for first, stop in pairwise(edges)]).cumsum()
    columns = []
    for s, (first, stop) in enumerate(pairwise(edges)):
        counts, place = strips.count[first:stop], ends[s - 1] if s else 0
        number = max(-(-(ends[s] - place) // RANGE_KEYS), threads if segments < threads else 1)
        inner = _quantiles(keys[first:stop], counts, int(number))
        for low, high in zip([0, *inner], [*inner, _LARGEST_KEY], strict=True):
            columns.append((s, first, stop, low, high, place))
    of_ranges: tuple[Any, ...] = tuple(zip(*columns, strict=True))
    types = (np.int64, np.int64, np.int64, np.uint64, np.uint64, np.int64)
    arrays: Any = (np.array(column, kind) for column, kind in zip(of_ranges, types, strict=True))
    return Ranges(*arrays), ends


def _quantiles(keys: npt.NDArray[np.uint64], counts: Integers, number: int) -> list[int]:
    """Keys that divide those of a segment's strips into so many ranges of about the same size."""
    strips = np.flatnonzero(counts)
    if len(strips) == 0:
        return []
    places = counts[strips, None] * np.arange(_SAMPLES) // _SAMPLES
    sample, weights = keys[strips[:, None], places].ravel(), counts[strips].repeat(_SAMPLES)
    order = sample.argsort()
    below = weights[order].cumsum()
    found = np.searchsorted(below, below[-1] * np.arange(1, number) // number)
    return [int(key) for key in sample[order][found]]


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
) -> None:
    """Writes the gradient of each strip's pixels: that of the keys, and 0 elsewhere."""
    while True:
        task = claim(tasks, len(strips.segment))
        if task >= len(strips.segment):
            break
        s, start, stop, count, j = strips.segment[task], strips.start[task], strips.stop[task], strips.count[task], 0
        place, own = places[task, :count], g[task * STRIP_PIXELS : task * STRIP_PIXELS + count]
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
