"""Loops over the segments of a Lovász term: each is sorted, counted in a table, or only its maximum is found."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from lovasz.core.backends.numba import scanning, sorting, tables
from lovasz.core.backends.numba.intrinsics import compiled, pointer
from lovasz.core.backends.numba.planes import Floats, Integers, Planes, claim
from lovasz.core.backends.numba.sorting import Keys


class Segments(NamedTuple):
    """Tasks of a loop, one element per segment.

    Attributes:
        counted: whether it is counted in a table.
        row: the row of its errors and gradients.
        code_row: the row of its codes.
        foreground: the code of its foreground.
        foreground_count: the number of its foreground pixels; an absent segment has none.
        first_plane, stop_plane: its planes are [first_plane, stop_plane).
        start, stop: its pixels in the row are [start, stop).
        top: the exponent of the first octave of its table; at least the exponent of its largest error.
        weight, foreground_weight: the factors of the gradient of background and foreground.
    """

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


class Segment(NamedTuple):
    """One of the ``Segments``, which is not counted."""

    row: int
    code_row: int
    foreground: int
    foreground_count: int
    first_plane: int
    stop_plane: int
    start: int
    stop: int
    weight: float
    foreground_weight: float


class Rules(NamedTuple):
    """The settings for all segments of a term.

    Attributes:
        void: the code of pixels that are void for all terms.
        ignored: the code of further pixels that are void for this term; ``void`` if there are none.
        cut: whether a pixel with error 0 gets gradient 0, as for the hinge.
        want_grad: whether gradients are wanted.
        add: whether gradients are added to the memory's contents; otherwise they overwrite them.
        most_order_error: a counted segment is sorted instead if ``scanning.order_error`` of its table exceeds this.
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
        table: ``tables.WORDS`` words for this thread alone, all 0 before and after.
        keys, other_keys, room: memory for this thread alone, each with as many elements as the largest segment that may
            be sorted has pixels.
    """
    while True:
        s = claim(tasks, len(segments.row))
        if s >= len(segments.row):
            break
        if segments.counted[s]:
            start, stop = segments.start[s], segments.stop[s]
            error = errors[segments.row[s], start:stop]
            code = codes[segments.code_row[s], start:stop]
            last = tables.last_distance(error, code, segments.foreground[s], segments.top[s])
            lowest, highest = count_range(segments, s, rules, errors, codes, start, stop, last, table)
            is_fine = keeps_order(segments, s, rules, lowest, highest, table)
            if is_fine:
                losses[s] = scan(segments, s, lowest, highest, table)
                if rules.want_grad:
                    look_up_range(segments, s, rules, planes, errors, codes, start, stop, last, table)
            tables.clear(table, lowest, highest)
            if is_fine:
                continue
        segment = Segment(
            row=segments.row[s],
            code_row=segments.code_row[s],
            foreground=segments.foreground[s],
            foreground_count=segments.foreground_count[s],
            first_plane=segments.first_plane[s],
            stop_plane=segments.stop_plane[s],
            start=segments.start[s],
            stop=segments.stop[s],
            weight=segments.weight[s],
            foreground_weight=segments.foreground_weight[s],
        )
        losses[s] = sort_segment(segment, rules, planes, errors, codes, keys, other_keys, room)


@compiled
def sort_segment(
    segment: Segment,
    rules: Rules,
    planes: Planes,
    errors: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    keys: Keys,
    other_keys: Keys,
    room: Floats,
) -> float:
    """Writes the gradient of a segment that is not counted, and returns its loss. For the arguments see ``score``."""
    error = errors[segment.row, segment.start : segment.stop]
    code = codes[segment.code_row, segment.start : segment.stop]
    g = room[: len(error)] if rules.want_grad else room[:0]
    is_direct = rules.want_grad and not rules.add and segment.stop_plane == segment.first_plane + 1
    if is_direct:
        g = _grads(segment.row, planes, segment.first_plane)
    if segment.foreground_count == 0:
        loss = sorting.largest(error, code, rules.void, rules.ignored, segment.weight, rules.cut, g)
    else:
        loss = sorting.extension(
            error,
            code,
            segment.foreground,
            rules.void,
            rules.ignored,
            segment.weight,
            segment.foreground_weight,
            rules.cut,
            keys,
            other_keys,
            g,
        )
    if rules.want_grad and not is_direct:
        _hand_out(segment, rules, planes, g)
    return loss


@compiled
def count_range(
    segments: Segments,
    s: int,
    rules: Rules,
    errors: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    start: int,
    stop: int,
    last: int,
    table: Integers,
) -> tuple[int, int]:
    """Counts the pixels [start, stop) of a segment; returns the lowest and the highest bin in use.

    Args:
        last: as for :func:`lovasz.core.backends.numba.tables.count`.
    """
    error, code = errors[segments.row[s], start:stop], codes[segments.code_row[s], start:stop]
    return tables.count(
        error, code, segments.foreground[s], rules.void, rules.ignored, rules.cut, segments.top[s], last, table
    )


@compiled
def keeps_order(segments: Segments, s: int, rules: Rules, lowest: int, highest: int, table: Integers) -> bool:
    """Whether a segment's table, after counting, leaves little enough uncertainty about the order of its pixels."""
    if rules.most_order_error == np.inf:
        return True
    return scanning.order_error(table, lowest, highest, segments.foreground_count[s]) <= rules.most_order_error


@compiled
def scan(segments: Segments, s: int, lowest: int, highest: int, table: Integers) -> float:
    """Scans a segment's table, which writes its entries; returns the loss."""
    return scanning.scan(
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
    last: int,
    table: Integers,
) -> None:
    """Writes the gradient of the pixels [start, stop) of a segment."""
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
        last,
        rules.add,
    )


@compiled
def _hand_out(segment: Segment, rules: Rules, planes: Planes, g: Floats) -> None:
    """Writes a segment's gradient ``g`` to the gradients of its planes."""
    for plane in range(segment.first_plane, segment.stop_plane):
        grads = _grads(segment.row, planes, plane)
        own = g[planes.start[plane] - segment.start :][: len(grads)]
        if rules.add:
            for i in range(len(grads)):
                grads[i] += own[i]
        else:
            for i in range(len(grads)):
                grads[i] = own[i]


@compiled
def _grads(row: int, planes: Planes, plane: int) -> Floats:
    """The gradient of a row of a plane."""
    pixels = planes.pixels[plane]
    address = planes.grads[plane] + np.uint64(4 * pixels * row)
    grads: Floats = numba.carray(pointer(address), (pixels,), np.float32)
    return grads
