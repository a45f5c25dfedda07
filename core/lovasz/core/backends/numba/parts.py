"""Loops over parts of segments: one so large that other threads would be idle is counted in several tables."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lovasz.core.backends.numba import tables
from lovasz.core.backends.numba.intrinsics import compiled
from lovasz.core.backends.numba.planes import Integers, Planes, claim
from lovasz.core.backends.numba.segments import Rules, Segments, count_range, keeps_order, look_up_range, scan


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
    part_tables: npt.NDArray[np.int64],
) -> None:
    """Scans the table of each segment, that of its first part.

    Args:
        firsts: the first part of each segment.
        is_fine: one per segment, written: the result of ``keeps_order``; if false, the table is not scanned.
    """
    while True:
        task = claim(tasks, len(firsts))
        if task >= len(firsts):
            break
        first = firsts[task]
        s, table = parts.segment[first], part_tables[first]
        lowest, highest = parts.lowest[first], parts.highest[first]
        is_fine[s] = keeps_order(segments, s, rules, lowest, highest, table)
        if is_fine[s]:
            losses[s] = scan(segments, s, lowest, highest, table)


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
) -> None:
    """Writes the gradient of each part of the segments for which ``is_fine`` is true."""
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
