"""Large segments few of whose pixels matter: threads select their keys in runs of pixels, and sort them in ranges."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from lovasz.core.backends.numba import sorting
from lovasz.core.backends.numba.call import Call
from lovasz.core.backends.numba.intrinsics import compiled, pointer
from lovasz.core.backends.numba.planes import Floats, Integers, Planes, claim
from lovasz.core.backends.numba.segments import Rules, Segments
from lovasz.core.backends.numba.sorting import KEY_PADDING, Keys

RUN_PIXELS = 1 << 14
"""Pixels per task of the selection."""

RANGE_KEYS = 1 << 17
"""About the most keys that are sorted at a time: they, and the memory that they are moved to, take two megabytes."""

_SAMPLES = 16
"""The keys of a run that are looked at to divide the keys of its segment into ranges."""
_LARGEST_KEY = np.iinfo(np.uint64).max


class Runs(NamedTuple):
    """Tasks of a loop, one element per run of pixels; the runs of a segment are consecutive.

    Attributes:
        segment: the segment of the run.
        first: the first run of this segment.
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
        first_run, stop_run: the runs of this segment are [first_run, stop_run).
        low, high: its keys are in [low, high).
        place: the place in ``losses`` of the segment's first key.
        padding: the keys are kept so many elements further on than their losses.
    """

    segment: Integers
    first_run: Integers
    stop_run: Integers
    low: Keys
    high: Keys
    place: Integers
    padding: Integers


def sort_in_ranges(call: Call, found: Segments, codes: npt.NDArray[np.uint8], rules: Rules) -> npt.NDArray[np.float64]:
    """Scores segments of a loss with ``rules.cut``; returns their losses.

    Gradients and losses have the bits of ``sorting.extension``.
    """
    runs = _runs(found)
    keys = call.scratch.array("keys of runs", (len(runs.segment), RUN_PIXELS + KEY_PADDING), np.uint64)
    places = call.scratch.array("places of keys", (len(runs.segment), RUN_PIXELS), np.uint16)
    g = call.scratch.array("gradients of keys", (places.size if rules.want_grad else 0,), np.float32)
    of_runs: dict[str, Any] = {"runs": runs, "segments": found, "rules": rules, "places": places}
    call.run(select, errors=call.errors, codes=codes, keys=keys, **of_runs)
    ranges, ends = _ranges(runs, keys, len(found.row), call.threads)
    memory = call.scratch.array("keys of ranges", (2, ends[-1] + KEY_PADDING * len(ranges.segment)), np.uint64)
    losses = call.scratch.array("losses of keys", (int(ends[-1]),), np.float64)
    of_keys: dict[str, Any] = {"keys": keys, "own_keys": memory[0], "other_keys": memory[1]}
    call.run(rank, ranges=ranges, counts=runs.count, segments=found, losses=losses, g=g, **of_keys)
    if rules.want_grad:
        call.run(write, planes=call.planes, g=g, **of_runs)
    return np.array([sorting.sum_of_losses(own) for own in np.split(losses, ends[:-1])])


def _runs(found: Segments) -> Runs:
    pixels = found.stop - found.start
    per_segment = -(-pixels // RUN_PIXELS)
    segment = np.repeat(np.arange(len(pixels)), per_segment)
    first = np.repeat(np.cumsum(per_segment) - per_segment, per_segment)
    start = found.start[segment] + (np.arange(len(segment)) - first) * RUN_PIXELS
    return Runs(segment, first, start, np.minimum(start + RUN_PIXELS, found.stop[segment]), np.zeros_like(start))


def _ranges(runs: Runs, keys: npt.NDArray[np.uint64], segments: int, threads: int) -> tuple[Ranges, Integers]:
    """The ranges of all segments, and the place in ``losses`` where the keys of each segment end."""
    edges = np.searchsorted(runs.segment, np.arange(segments + 1))
    ends = np.array([runs.count[first:stop].sum() for first, stop in pairwise(edges)]).cumsum()
    columns = []
    for s, (first, stop) in enumerate(pairwise(edges)):
        counts, place = runs.count[first:stop], ends[s - 1] if s else 0
        number = max(-(-(ends[s] - place) // RANGE_KEYS), threads if segments < threads else 1)
        inner = _quantiles(keys[first:stop], counts, int(number))
        for low, high in zip([0, *inner], [*inner, _LARGEST_KEY], strict=True):
            columns.append((s, first, stop, low, high, place, KEY_PADDING * len(columns)))
    of_ranges: tuple[Any, ...] = tuple(zip(*columns, strict=True))
    types = (np.int64, np.int64, np.int64, np.uint64, np.uint64, np.int64, np.int64)
    arrays: Any = (np.array(column, kind) for column, kind in zip(of_ranges, types, strict=True))
    return Ranges(*arrays), ends


def _quantiles(keys: npt.NDArray[np.uint64], counts: Integers, number: int) -> list[int]:
    """Keys that divide those of a segment's runs into so many ranges of about the same size."""
    runs = np.flatnonzero(counts)
    if len(runs) == 0:
        return []
    places = counts[runs, None] * np.arange(_SAMPLES) // _SAMPLES
    sample, weights = keys[runs[:, None], places].ravel(), counts[runs].repeat(_SAMPLES)
    order = sample.argsort()
    below = weights[order].cumsum()
    found = np.searchsorted(below, below[-1] * np.arange(1, number) // number)
    return [int(key) for key in sample[order][found]]


@compiled
def select(
    tasks: Integers,
    runs: Runs,
    segments: Segments,
    rules: Rules,
    errors: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    keys: npt.NDArray[np.uint64],
    places: npt.NDArray[np.uint16],
) -> None:
    """Writes the keys of each run's errors above 0, and their places in the run.

    The position in a key becomes its place among the keys of the segment, as if each run had ``RUN_PIXELS`` keys. So
    the order stays that of the pixels, and the gradients of keys lie closer together than those of pixels.
    """
    while True:
        task = claim(tasks, len(runs.segment))
        if task >= len(runs.segment):
            break
        s, start, stop = runs.segment[task], runs.start[task], runs.stop[task]
        own, place = keys[task], places[task]
        kept = sorting.select(
            errors[segments.row[s], start:stop],
            codes[segments.code_row[s], start:stop],
            segments.foreground[s],
            rules.void,
            rules.ignored,
            0,
            True,
            own,
        )
        sorting.renumber(own[:kept], (task - runs.first[task]) * RUN_PIXELS, place)
        runs.count[task] = kept


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
        counts: the number of keys of each run.
        own_keys, other_keys: memory for the keys of all ranges, with ``KEY_PADDING`` for each range.
        g: written: the gradient of each key, ``RUN_PIXELS`` elements for each run.
    """
    while True:
        task = claim(tasks, len(ranges.segment))
        if task >= len(ranges.segment):
            break
        s, low, high = ranges.segment[task], ranges.low[task], ranges.high[task]
        before, foreground_before = 0, 0
        for run in range(ranges.first_run[task], ranges.stop_run[task]):
            count, foreground = sorting.count_before(keys[run, : counts[run]], low)
            before, foreground_before = before + count, foreground_before + foreground
        place = ranges.place[task] + before
        own, other = own_keys[place + ranges.padding[task] :], other_keys[place + ranges.padding[task] :]
        kept = 0
        for run in range(ranges.first_run[task], ranges.stop_run[task]):
            kept += sorting.select_range(keys[run], counts[run], low, high, own[kept:])
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
            g[ranges.first_run[task] * RUN_PIXELS :],
        )


@compiled
def write(
    tasks: Integers,
    runs: Runs,
    segments: Segments,
    rules: Rules,
    planes: Planes,
    places: npt.NDArray[np.uint16],
    g: Floats,
) -> None:
    """Writes the gradient of each run's pixels: that of the keys, and 0 elsewhere."""
    while True:
        task = claim(tasks, len(runs.segment))
        if task >= len(runs.segment):
            break
        s, start, stop, count, j = runs.segment[task], runs.start[task], runs.stop[task], runs.count[task], 0
        place, own = places[task, :count], g[task * RUN_PIXELS : task * RUN_PIXELS + count]
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
