"""Loops over parts of segments: one so large that other threads would be idle is counted in several tables."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lovasz.core.backends.numba import tables
from lovasz.core.backends.numba.intrinsics import compiled
from lovasz.core.backends.numba.keys import Keys
from lovasz.core.backends.numba.planes import Floats, Integers, Planes, claim
from lovasz.core.backends.numba.segments import Rules, Segments, add_at, count_range, look_up_range
from lovasz.core.backends.numba.windows import (
    NO_CEILING,
    find_window,
    is_accepted,
    scan,
    select_window,
    sort_window,
    window_bits,
)


class WindowsOfSegments(NamedTuple):
    """The windows of segments, int64, one element per segment: see ``windows.window_bits`` and ``Window``.

    If a window has no pixels, its ``floor`` is ``NO_CEILING``.
    """

    floor: Integers
    ceiling: Integers
    before: Integers
    foreground_before: Integers


class Parts(NamedTuple):
    """Tasks of a loop, one element per part of a segment; the parts of a segment are consecutive.

    Attributes:
        segment: the segment of the part.
        start, stop: its pixels in the row are [start, stop).
        lowest, highest: written: the lowest and the highest bin in use.
    """

    segment: Integers
    start: Integers
    stop: Integers
    lowest: Integers
    highest: Integers


@compiled
def count_parts(
    tasks: Integers,
    parts: Parts,
    segments: Segments,
    rules: Rules,
    planes: Planes,
    errors: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    part_tables: npt.NDArray[np.int64],
) -> None:
    """Fills each part's table."""
    while True:
        p = claim(tasks, len(parts.segment))
        if p >= len(parts.segment):
            break
        parts.lowest[p], parts.highest[p] = count_range(
            segments,
            parts.segment[p],
            rules,
            planes,
            errors,
            codes,
            parts.start[p],
            parts.stop[p],
            tables.ALL_DISTANCES,
            part_tables[p],
        )


@compiled
def add_parts(tasks: Integers, firsts: Integers, parts: Parts, part_tables: npt.NDArray[np.int64]) -> None:
    """Adds the tables of each segment's parts to the table of its first part.

    Args:
        firsts: the first part of each segment.
    """
    while True:
        task = claim(tasks, len(firsts))
        if task >= len(firsts):
            break
        first = firsts[task]
        s, table = parts.segment[first], part_tables[first]
        lowest, highest = parts.lowest[first], parts.highest[first]
        p = first + 1
        while p < len(parts.segment) and parts.segment[p] == s:
            other, low, high = part_tables[p], parts.lowest[p], parts.highest[p]
            table[low : high + 1] += other[low : high + 1]
            table[tables.BINS + low : tables.BINS + high + 1] += other[tables.BINS + low : tables.BINS + high + 1]
            tables.clear(other, low, high)
            lowest, highest = min(lowest, low), max(highest, high)
            p += 1
        parts.lowest[first], parts.highest[first] = lowest, highest


@compiled
def scan_parts(
    tasks: Integers,
    firsts: Integers,
    parts: Parts,
    segments: Segments,
    rules: Rules,
    losses: npt.NDArray[np.float64],
    is_fine: npt.NDArray[np.bool_],
    windows: WindowsOfSegments,
    part_tables: npt.NDArray[np.int64],
) -> None:
    """Scans the table of each segment, that of its first part, without its window.

    Args:
        firsts: the first part of each segment.
        losses: one per segment, written: the loss of the pixels outside its window.
        is_fine: one per segment, written: whether counting is exact enough; if false, the table is not scanned.
        windows: written.
    """
    while True:
        task = claim(tasks, len(firsts))
        if task >= len(firsts):
            break
        first = firsts[task]
        s, table = parts.segment[first], part_tables[first]
        lowest, highest = parts.lowest[first], parts.highest[first]
        windows.floor[s] = NO_CEILING
        window = find_window(segments, s, rules, lowest, highest, table)
        is_fine[s] = is_accepted(segments, s, rules, window)
        if is_fine[s]:
            losses[s] = scan(segments, s, window, lowest, highest, table)
            if window.pixels > 0:
                windows.floor[s], windows.ceiling[s] = window_bits(segments, s, rules, window)
                windows.before[s], windows.foreground_before[s] = window.before, window.foreground_before


@compiled
def select_parts(
    tasks: Integers,
    parts: Parts,
    segments: Segments,
    rules: Rules,
    errors: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    windows: WindowsOfSegments,
    values: npt.NDArray[np.float32],
    places: npt.NDArray[np.int32],
    counts: Integers,
) -> None:
    """Selects the pixels of each part that are in its segment's window.

    Args:
        values, places: one row per part, written; see ``selecting.select_window``.
        counts: one per part, written: how many they are.
    """
    while True:
        p = claim(tasks, len(parts.segment))
        if p >= len(parts.segment):
            break
        s, counts[p] = parts.segment[p], 0
        if windows.floor[s] != NO_CEILING:
            start, stop = parts.start[p], parts.stop[p]
            counts[p] = select_window(
                segments,
                s,
                rules,
                errors,
                codes,
                start,
                stop,
                windows.floor[s],
                windows.ceiling[s],
                values[p],
                places[p],
            )


@compiled
def sort_windows(
    tasks: Integers,
    segments: Segments,
    windows: WindowsOfSegments,
    edges: Integers,
    values: Floats,
    losses: npt.NDArray[np.float64],
    g: Floats,
    keys: Keys,
    other_keys: Keys,
) -> None:
    """Writes the gradients of the pixels of the windows, and adds their losses.

    Args:
        edges: the place where the pixels of each segment's window begin in ``values`` and ``g``, and at last their end.
        losses: one per segment.
        g: shape (0,) if no gradient is wanted.
        keys, other_keys: memory for this thread alone, for the keys of the largest window.
    """
    while True:
        s = claim(tasks, len(segments.row))
        if s >= len(segments.row):
            break
        own = slice(edges[s], edges[s + 1])
        before, foreground_before = windows.before[s], windows.foreground_before[s]
        losses[s] += sort_window(segments, s, before, foreground_before, values[own], keys, other_keys, g[own])


@compiled
def look_up_parts(
    tasks: Integers,
    table_of_part: Integers,
    parts: Parts,
    segments: Segments,
    rules: Rules,
    planes: Planes,
    errors: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    is_fine: npt.NDArray[np.bool_],
    part_tables: npt.NDArray[np.int64],
    places: npt.NDArray[np.int32],
    counts: Integers,
    first: Integers,
    g: Floats,
) -> None:
    """Writes the gradient of each part of the segments for which ``is_fine`` is true.

    Args:
        places, counts: as ``select_parts`` has written them.
        first: the place in ``g`` of each part's first pixel of the window.
        g: as ``sort_windows`` has written it.
    """
    while True:
        p = claim(tasks, len(parts.segment))
        if p >= len(parts.segment):
            break
        if not is_fine[parts.segment[p]]:
            continue
        table = part_tables[table_of_part[p]]
        start, stop = parts.start[p], parts.stop[p]
        look_up_range(
            segments, parts.segment[p], rules, planes, errors, codes, start, stop, tables.ALL_DISTANCES, table
        )
        of_window = g[first[p] : first[p] + counts[p]]
        add_at(segments, parts.segment[p], planes, places[p, : counts[p]], of_window)
