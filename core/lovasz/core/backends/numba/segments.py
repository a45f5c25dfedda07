"""The segments of a Lovász term, and what is done with one: it is sorted, or only its maximum is found, or counted."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from lovasz.core.backends.numba import sorting, tables
from lovasz.core.backends.numba.intrinsics import compiled, pointer
from lovasz.core.backends.numba.keys import Keys
from lovasz.core.backends.numba.planes import Floats, Integers, Planes
from lovasz.core.backends.numba.selecting import Places, smallest_foreground


class Segments(NamedTuple):
    """Tasks of a loop, one element per segment.

    Attributes:
        smallest: the bits of its smallest foreground error; below 0: it has to be looked for.
        counted: whether it is counted in a table.
        row: the row of its errors and gradients.
        code_row: the row of its codes.
        foreground: the code of its foreground.
        foreground_count: the number of its foreground pixels; an absent segment has none.
        first_plane, stop_plane: its planes are [first_plane, stop_plane).
        start, stop: its pixels in the row are [start, stop).
        top: the exponent of the first octave of its table; at least the exponent of its largest error. Overwritten with
            ``fine_top`` if sorting its window is not enough.
        fine_top: the lowest such exponent.
        few: as for ``scanning.window``; below 0 if nothing is sorted of segments that are counted.
        most_error: as for ``scanning.window``.
        weight, foreground_weight: the factors of the gradient of background and foreground.
    """

    smallest: Integers
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
    fine_top: Integers
    few: Integers
    most_error: npt.NDArray[np.float64]
    weight: npt.NDArray[np.float64]
    foreground_weight: npt.NDArray[np.float64]


class Segment(NamedTuple):
    """One of the ``Segments``, which is not counted."""

    smallest: int
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


class WindowRules(NamedTuple):
    """Which pixels of counted segments are sorted.

    Attributes:
        is_bounded, is_weighed, most: as for ``scanning.window``; if ``most`` is 0, none are sorted.
        must_suffice: whether all are sorted if a window is not enough.
    """

    is_bounded: bool
    is_weighed: bool
    most: int
    must_suffice: bool


class Rules(NamedTuple):
    """The settings for all segments of a term.

    Attributes:
        void: the code of pixels that are void for all terms.
        ignored: the code of further pixels that are void for this term; ``void`` if there are none.
        cut: whether a pixel with error 0 gets gradient 0, as for the hinge.
        want_grad: whether gradients are wanted.
        add: whether gradients are added to the memory's contents; otherwise they overwrite them.
        keep: whether this memory keeps the position of each pixel of a segment from counting to looking up.
        windows: the settings for the windows of counted segments.
    """

    void: int
    ignored: int
    cut: bool
    want_grad: bool
    add: bool
    keep: bool
    windows: WindowRules


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
    """Writes the gradient of a segment that is not counted; returns its loss. For the arguments see ``undivided``."""
    error = errors[segment.row, segment.start : segment.stop]
    code = codes[segment.code_row, segment.start : segment.stop]
    g = room[: len(error)] if rules.want_grad else room[:0]
    is_direct = rules.want_grad and not rules.add and segment.stop_plane == segment.first_plane + 1
    if is_direct:
        g = grads_of(segment.row, planes, segment.first_plane)
    if segment.foreground_count == 0:
        loss = sorting.largest(error, code, rules.void, rules.ignored, segment.weight, rules.cut, g)
    else:
        smallest = segment.smallest
        loss = sorting.extension(
            error,
            code,
            segment.foreground,
            rules.void,
            rules.ignored,
            smallest if smallest >= 0 else smallest_foreground(error, code, segment.foreground),
            segment.foreground_count,
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
    planes: Planes,
    errors: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    start: int,
    stop: int,
    last: int,
    table: Integers,
) -> tuple[int, int]:
    """Counts the pixels [start, stop) of a segment; returns the lowest and the highest bin in use.

    Args:
        last: as in :class:`lovasz.core.backends.numba.tables.Pixels`.
    """
    kept = np.empty(0, np.int32)
    lowest, highest = np.int64(tables.BINS), np.int64(-1)
    for plane in range(segments.first_plane[s], segments.stop_plane[s]):
        first, end = _common(planes, plane, start, stop)
        if first < end:
            if rules.keep:
                kept = _part_of_grads(segments.row[s], planes, plane, first, end).view(np.int32)
            low, high = tables.count(_pixels(segments, s, rules, errors, codes, first, end, last), table, kept)
            lowest, highest = min(lowest, low), max(highest, high)
    return lowest, highest


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
    """Writes the gradient of the pixels [start, stop) of a segment, which ``count_range`` has counted."""
    for plane in range(segments.first_plane[s], segments.stop_plane[s]):
        first, end = _common(planes, plane, start, stop)
        if first < end:
            grads = _part_of_grads(segments.row[s], planes, plane, first, end)
            if rules.keep:
                tables.look_up(grads.view(np.int32), table, grads)
            else:
                pixels = _pixels(segments, s, rules, errors, codes, first, end, last)
                tables.look_up_again(pixels, table, rules.add, grads)


@compiled
def _pixels(
    segments: Segments,
    s: int,
    rules: Rules,
    errors: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    first: int,
    end: int,
    last: int,
) -> tables.Pixels:
    """The pixels [first, end) of a segment."""
    return tables.Pixels(
        errors[segments.row[s], first:end],
        codes[segments.code_row[s], first:end],
        segments.foreground[s],
        rules.void,
        rules.ignored,
        rules.cut,
        segments.top[s],
        last,
    )


@compiled
def _common(planes: Planes, plane: int, start: int, stop: int) -> tuple[int, int]:
    """The pixels of a plane that are in [start, stop)."""
    begin = planes.start[plane]
    return max(start, begin), min(stop, begin + planes.pixels[plane])


@compiled
def _part_of_grads(row: int, planes: Planes, plane: int, first: int, end: int) -> Floats:
    """The gradient of the pixels [first, end), which are counted from the first pixel of all planes."""
    begin = planes.start[plane]
    return grads_of(row, planes, plane)[first - begin : end - begin]


@compiled
def _hand_out(segment: Segment, rules: Rules, planes: Planes, g: Floats) -> None:
    """Writes a segment's gradient ``g`` to the gradients of its planes."""
    for plane in range(segment.first_plane, segment.stop_plane):
        grads = grads_of(segment.row, planes, plane)
        own = g[planes.start[plane] - segment.start :][: len(grads)]
        if rules.add:
            for i in range(len(grads)):
                grads[i] += own[i]
        else:
            for i in range(len(grads)):
                grads[i] = own[i]


@compiled
def write_at(segments: Segments, s: int, rules: Rules, planes: Planes, places: Places, g: Floats) -> None:
    """Writes a segment's gradient, which is 0 but at some of its pixels; see ``add_at``."""
    if not rules.add:
        for plane in range(segments.first_plane[s], segments.stop_plane[s]):
            grads_of(segments.row[s], planes, plane)[:] = np.float32(0)
    add_at(segments, s, planes, places, g)


@compiled
def add_at(segments: Segments, s: int, planes: Planes, places: Places, g: Floats) -> None:
    """Adds to a segment's gradient at some of its pixels.

    Args:
        places: these pixels, in ascending order, counted from the first one of the segment.
        g: what is added.
    """
    n = 0
    for plane in range(segments.first_plane[s], segments.stop_plane[s]):
        grads, begin = grads_of(segments.row[s], planes, plane), planes.start[plane] - segments.start[s]
        while n < len(places) and places[n] < begin + len(grads):
            grads[places[n] - begin] += g[n]
            n += 1


@compiled
def grads_of(row: int, planes: Planes, plane: int) -> Floats:
    """The gradient of a row of a plane."""
    pixels = planes.pixels[plane]
    address = planes.grads[plane] + np.uint64(4 * pixels * row)
    grads: Floats = numba.carray(pointer(address), (pixels,), np.float32)
    return grads
