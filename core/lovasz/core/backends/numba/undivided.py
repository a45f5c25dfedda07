"""A loop over segments that one thread scores each: counted, with their window sorted, or sorted as a whole."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lovasz.core.backends.numba import tables
from lovasz.core.backends.numba.intrinsics import compiled
from lovasz.core.backends.numba.keys import Keys
from lovasz.core.backends.numba.planes import Floats, Integers, Planes, claim
from lovasz.core.backends.numba.segments import (
    Rules,
    Segment,
    Segments,
    add_at,
    count_range,
    look_up_range,
    sort_segment,
    write_at,
)
from lovasz.core.backends.numba.selecting import Places, are_few, smallest_foreground
from lovasz.core.backends.numba.windows import (
    NO_CEILING,
    find_window,
    is_accepted,
    least_floor,
    scan,
    select_window,
    sort_window,
    window_bits,
)


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
    values: Floats,
    places: Places,
) -> None:
    """Writes each segment's loss and gradient.

    Args:
        table: ``tables.WORDS`` words for this thread alone, all 0 before and after.
        keys, other_keys, room: memory for this thread alone, each with as many elements as the largest window, and the
            largest segment that may be sorted, have pixels. A segment whose window is all that matters is sorted as a
            whole if ``room`` is large enough for it.
        values, places: likewise, for the largest window.
    """
    while True:
        s = claim(tasks, len(segments.row))
        if s >= len(segments.row):
            break
        if segments.counted[s]:
            memory = keys, other_keys, room, values, places
            is_fine = count_segment(segments, s, rules, planes, errors, codes, losses, table, memory)
            if not is_fine and segments.top[s] > segments.fine_top[s]:
                segments.top[s] = segments.fine_top[s]
                is_fine = count_segment(segments, s, rules, planes, errors, codes, losses, table, memory)
            if is_fine:
                continue
        losses[s] = sort_segment(_segment(segments, s), rules, planes, errors, codes, keys, other_keys, room)


@compiled
def _segment(segments: Segments, s: int) -> Segment:
    return Segment(
        smallest=segments.smallest[s],
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


@compiled
def count_segment(
    segments: Segments,
    s: int,
    rules: Rules,
    planes: Planes,
    errors: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    losses: npt.NDArray[np.float64],
    table: Integers,
    memory: tuple[Keys, Keys, Floats, Floats, Places],
) -> bool:
    """Writes loss and gradient of a segment by counting, and sorting its window; returns whether that is exact enough.

    Args:
        memory: ``keys``, ``other_keys``, ``room``, ``values`` and ``places``.
    """
    keys, other_keys, room, values, places = memory
    start, stop = segments.start[s], segments.stop[s]
    error, code = errors[segments.row[s], start:stop], codes[segments.code_row[s], start:stop]
    smallest = segments.smallest[s]
    if smallest < 0:
        smallest = smallest_foreground(error, code, segments.foreground[s])
    last = tables.last_distance(smallest, segments.top[s])
    floor = least_floor(rules, tables.floor_behind(last, segments.top[s]))
    if are_few(error, code, rules.void, rules.ignored, floor, segments.few[s]):
        if stop - start <= len(room):  # The same bits, and faster.
            losses[s] = sort_segment(_segment(segments, s), rules, planes, errors, codes, keys, other_keys, room)
            return True
        n = select_window(segments, s, rules, errors, codes, start, stop, floor, NO_CEILING, values, places)
        g = room[: n if rules.want_grad else 0]
        losses[s] = sort_window(segments, s, 0, 0, values[:n], keys, other_keys, g)
        if rules.want_grad:
            write_at(segments, s, rules, planes, places[:n], g)
        return True
    lowest, highest = count_range(segments, s, rules, planes, errors, codes, start, stop, last, table)
    window, n, loss = find_window(segments, s, rules, lowest, highest, table), 0, 0.0
    is_fine = is_accepted(segments, s, rules, window)
    if is_fine and window.pixels > 0:
        floor, ceiling = window_bits(segments, s, rules, window)
        n = select_window(segments, s, rules, errors, codes, start, stop, floor, ceiling, values, places)
        g = room[: n if rules.want_grad else 0]
        before, foreground_before = window.before, window.foreground_before
        loss = sort_window(segments, s, before, foreground_before, values[:n], keys, other_keys, g)
    if is_fine:
        losses[s] = loss + scan(segments, s, window, lowest, highest, table)
    if is_fine and rules.want_grad:
        look_up_range(segments, s, rules, planes, errors, codes, start, stop, last, table)
        add_at(segments, s, planes, places[:n], room[:n])
    tables.clear(table, lowest, highest)
    return is_fine
