"""The segments of a Lovász term: one class (row) over the pixels of one group, each sorted, counted, or a maximum."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from lovasz.core.backends.numba import sorting, tables
from lovasz.core.backends.numba.intrinsics import compiled, pointer
from lovasz.core.backends.numba.planes import Floats, Integers, Planes, claim
from lovasz.core.backends.numba.sorting import Keys
from lovasz.core.scoring import State

ABSENT = int(State.ABSENT)


class Segments(NamedTuple):
    """Tasks, one entry a segment.

    Attributes:
        state: a ``State``; ABSENT or SCORED.
        counted: whether it is counted in a table; if not, it is sorted.
        row: the row of errors, and of gradients.
        code_row: the row of codes.
        foreground: the code of its foreground.
        foreground_count: pixels that have it.
        first_plane, stop_plane: its planes are [first, last).
        start, stop: its pixels in the row are [start, stop).
        top: where it is counted, the exponent of the largest error (or more).
        weight: what background's gradients are multiplied with.
        foreground_weight: likewise foreground's.
    """

    state: Integers
    counted: npt.NDArray[np.bool_]
    row: Integers
    code_row: Integers
    foreground: Integers
    foreground_count: Integers
    first_plane: Integers
    stop_plane: Integers
    start: Integers
    stop: Integers
    top: Integers
    weight: npt.NDArray[np.float64]
    foreground_weight: npt.NDArray[np.float64]


class Rules(NamedTuple):
    """What holds for all segments of a term.

    Attributes:
        void: the code of pixels that take no part.
        ignored: another such code; ``void`` if there is none.
        cut: whether an error of 0 gets no gradient, as the hinge has it.
        want_grad: whether gradients are written.
        add: whether they are added to what stands there.
        most_order_error: segments whose tables leave more of it (``tables.order_error``) are sorted; infinity: none.
    """

    void: int
    ignored: int
    cut: bool
    want_grad: bool
    add: bool
    most_order_error: float


@compiled
def score(
    tasks: Integers,
    segments: Segments,
    rules: Rules,
    planes: Planes,
    errors: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    losses: npt.NDArray[np.float64],
    table: Integers,
    keys: Keys,
    other_keys: Keys,
    room: Floats,
) -> None:
    """Writes each segment's loss and gradient.

    Args:
        table: 2 x BINS + 1 words, all 0, and so again at the end; this thread's own, as what follows.
        keys: as many as the largest segment that may be sorted has pixels, as ``other_keys`` and ``room``.
    """
    while True:
        s = claim(tasks, len(segments.row))
        if s >= len(segments.row):
            break
        if segments.counted[s]:
            lowest, highest = count_range(segments, s, rules, errors, codes, segments.start[s], segments.stop[s], table)
            is_fine = keeps_order(segments, s, rules, lowest, highest, table)
            if is_fine:
                losses[s] = scan(segments, s, lowest, highest, table)
                if rules.want_grad:
                    look_up_range(segments, s, rules, planes, errors, codes, segments.start[s], segments.stop[s], table)
            tables.clear(table, lowest, highest)
            if is_fine:
                continue
        error = errors[segments.row[s], segments.start[s] : segments.stop[s]]
        code = codes[segments.code_row[s], segments.start[s] : segments.stop[s]]
        g = room[: len(error)] if rules.want_grad else room[:0]
        if segments.state[s] == ABSENT:
            losses[s] = sorting.largest(error, code, rules.void, rules.ignored, segments.weight[s], rules.cut, g)
        else:
            losses[s] = sorting.extension(
                error,
                code,
                segments.foreground[s],
                rules.void,
                rules.ignored,
                segments.weight[s],
                segments.foreground_weight[s],
                rules.cut,
                keys,
                other_keys,
                g,
            )
        if rules.want_grad:
            _hand_out(segments, s, rules, planes, g)


@compiled
def count_range(
    segments: Segments,
    s: int,
    rules: Rules,
    errors: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    start: int,
    stop: int,
    table: Integers,
) -> tuple[int, int]:
    """Counts a part of a segment; returns the lowest and the highest bin in use."""
    error, code = errors[segments.row[s], start:stop], codes[segments.code_row[s], start:stop]
    return tables.count(error, code, segments.foreground[s], rules.void, rules.ignored, segments.top[s], table)


@compiled
def keeps_order(segments: Segments, s: int, rules: Rules, lowest: int, highest: int, table: Integers) -> bool:
    """Whether a segment's bins, counted, tell enough of the order of its pixels."""
    if rules.most_order_error == np.inf:
        return True
    return tables.order_error(table, lowest, highest, segments.foreground_count[s]) <= rules.most_order_error


@compiled
def scan(segments: Segments, s: int, lowest: int, highest: int, table: Integers) -> float:
    """Turns a segment's table into one to look up in; returns the loss."""
    return tables.scan(
        table,
        lowest,
        highest,
        segments.foreground_count[s],
        segments.top[s],
        segments.weight[s],
        segments.foreground_weight[s],
    )


@compiled
def look_up_range(
    segments: Segments,
    s: int,
    rules: Rules,
    planes: Planes,
    errors: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    start: int,
    stop: int,
    table: Integers,
) -> None:
    """Writes the gradient of a part of a segment."""
    tables.look_up(
        errors,
        codes[segments.code_row[s]],
        segments.row[s],
        segments.foreground[s],
        rules.void,
        rules.ignored,
        rules.cut,
        segments.top[s],
        table,
        planes,
        segments.first_plane[s],
        segments.stop_plane[s],
        start,
        stop,
        rules.add,
    )


@compiled
def _hand_out(segments: Segments, s: int, rules: Rules, planes: Planes, g: Floats) -> None:
    """Copies a segment's gradients to those of its planes."""
    for plane in range(segments.first_plane[s], segments.stop_plane[s]):
        pixels = planes.pixels[plane]
        address = planes.grads[plane] + np.uint64(4 * pixels * segments.row[s])
        grads = numba.carray(pointer(address), (pixels,), np.float32)
        own = g[planes.start[plane] - segments.start[s] :][:pixels]
        if rules.add:
            for i in range(pixels):
                grads[i] += own[i]
        else:
            for i in range(pixels):
                grads[i] = own[i]


# A segment that would keep one thread busy while others idle is counted in parts, each in a table of its own.


class Parts(NamedTuple):
    """Tasks, one entry a part of a segment; parts of a segment stand side by side.

    Attributes:
        segment: whose part it is.
        start, stop: its pixels in the row.
        lowest, highest: written: the bins in use.
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
            segments, parts.segment[p], rules, errors, codes, parts.start[p], parts.stop[p], part_tables[p]
        )


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
    """Adds the tables of each segment's parts into that of its first part, and scans it.

    Args:
        firsts: the first part of each segment.
        is_fine: one a segment, written: whether its table will do; if not, it is not scanned.
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
        is_fine[s] = keeps_order(segments, s, rules, lowest, highest, table)
        if is_fine[s]:
            losses[s] = scan(segments, s, lowest, highest, table)
        parts.lowest[first], parts.highest[first] = lowest, highest


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
    """Writes the gradients of each part of the segments whose tables will do."""
    while True:
        p = claim(tasks, len(parts.segment))
        if p >= len(parts.segment):
            break
        if not is_fine[parts.segment[p]]:
            continue
        table = part_tables[table_of_part[p]]
        look_up_range(segments, parts.segment[p], rules, planes, errors, codes, parts.start[p], parts.stop[p], table)
