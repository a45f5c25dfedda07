"""Windows: of a segment that is counted, the pixels that are sorted, since their order matters most."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lovasz.core.backends.numba import scanning, selecting, sorting, tables
from lovasz.core.backends.numba.intrinsics import compiled
from lovasz.core.backends.numba.keys import Keys, write_keys
from lovasz.core.backends.numba.planes import Floats, Integers
from lovasz.core.backends.numba.scanning import Window
from lovasz.core.backends.numba.segments import Rules, Segments
from lovasz.core.backends.numba.selecting import Places

NO_CEILING = (1 << 31) - 1
"""The bits of any error are at most these."""


@compiled
def find_window(segments: Segments, s: int, rules: Rules, lowest: int, highest: int, table: Integers) -> Window:
    """The window of a segment whose table has been counted."""
    windows = rules.windows
    if windows.most == 0:
        return Window(lowest, lowest, 0, 0, 0, 0, True)
    return scanning.window(
        table,
        lowest,
        highest,
        segments.foreground_count[s],
        segments.top[s],
        windows.is_bounded,
        windows.is_weighed,
        segments.most_error[s],
        segments.few[s],
        windows.most,
    )


@compiled
def is_accepted(segments: Segments, s: int, rules: Rules, window: Window) -> bool:
    """Whether a segment's window is enough, or nothing better is to be had."""
    return window.is_enough or not (rules.windows.must_suffice or segments.top[s] > segments.fine_top[s])


@compiled
def window_bits(segments: Segments, s: int, rules: Rules, window: Window) -> tuple[int, int]:
    """(floor, ceiling) of ``selecting.select_window`` for the pixels of a segment's window."""
    top = segments.top[s]
    return least_floor(rules, tables.floor(window.stop, top)), tables.floor(window.first, top)


@compiled
def least_floor(rules: Rules, floor: int) -> int:
    """With ``cut``, errors of 0 are in no table, and so in no window."""
    return max(floor, 0) if rules.cut else floor


@compiled
def select_window(
    segments: Segments,
    s: int,
    rules: Rules,
    errors: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    start: int,
    stop: int,
    floor: int,
    ceiling: int,
    values: Floats,
    places: Places,
) -> int:
    """Selects those of the pixels [start, stop) that are in their segment's window; see ``selecting.select_window``."""
    return selecting.select_window(
        errors[segments.row[s], start:stop],
        codes[segments.code_row[s], start:stop],
        segments.foreground[s],
        rules.void,
        rules.ignored,
        floor,
        ceiling,
        start - segments.start[s],
        values,
        places,
    )


@compiled
def sort_window(
    segments: Segments,
    s: int,
    before: int,
    foreground_before: int,
    values: Floats,
    keys: Keys,
    other_keys: Keys,
    g: Floats,
) -> float:
    """Writes the gradient of the pixels of a segment's window, in the order of ``values``; returns their loss.

    Args:
        before, foreground_before: as in ``Window``.
        values: as ``select_window`` writes them.
        keys, other_keys: memory for at least as many keys.
        g: shape (0,) if no gradient is wanted.
    """
    n, foreground_count = len(values), segments.foreground_count[s]
    write_keys(values, keys[:n])
    in_order, free = sorting.sort(keys[:n], other_keys[:n])
    return sorting.rank(
        in_order,
        before,
        foreground_before,
        foreground_count,
        segments.weight[s],
        segments.foreground_weight[s],
        False,
        free.view(np.float64),
        g,
    )


@compiled
def scan(segments: Segments, s: int, window: Window, lowest: int, highest: int, table: Integers) -> float:
    """Scans a segment's table, which writes its entries, 0 for its window; returns the loss of all other pixels."""
    count, top = segments.foreground_count[s], segments.top[s]
    weight, foreground_weight = segments.weight[s], segments.foreground_weight[s]
    if window.pixels == 0:
        return scanning.scan(table, lowest, highest, count, count, top, weight, foreground_weight)
    foreground = window.foreground_before + window.foreground
    union = count + window.before + window.pixels - foreground
    table[window.first : window.stop] = 0
    table[tables.BINS + window.first : tables.BINS + window.stop] = 0
    loss = 0.0
    if lowest < window.first:
        loss += scanning.scan(table, lowest, window.first - 1, count, count, top, weight, foreground_weight)
    if window.stop <= highest:
        loss += scanning.scan(table, window.stop, highest, count - foreground, union, top, weight, foreground_weight)
    return loss
