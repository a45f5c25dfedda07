"""The bins of the GPU's tables.

A bin is a run of consecutive floats. The leading bits of an error, as a float32, give its *cell*, a run of 2^SHIFT
floats. A *map* holds one integer per cell, which says how many bins the cell is divided into, all equally wide, and
where in the table they end. Bins are in descending order of the error. Errors outside all cells share the last bin.

For softmax the cells are the octaves (SHIFT 23) and the map is fixed: errors are at most 1, and smaller ones weigh less
in the gradient. Errors of the hinge have any scale and all weigh the same, so the cells of binary losses (SHIFT 15, 256
per octave) get bins in proportion to the pixels that the first sweep has counted in them
(``binary_segments.share_out``). Section 11 of docs/mathematics.md explains the numbers of bins.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt

SOFTMAX_SHIFT = 23
SOFTMAX_TOP = 127
"""The leading bits of the errors in the first cell, [1, 2)."""
_CELL_BITS = (11, *[14] * 2, *[13] * 2, *[11] * 16, *[8] * 8, *[6] * 14, *[5] * 22, *[4] * 62)
"""log2 of the number of bins of each octave, in groups of at least 2^18 pixels."""
SOFTMAX_CELLS = len(_CELL_BITS)

BINARY_SHIFT = 15
BINARY_BINS = 1 << 17
_CELLS_PER_OCTAVE = 1 << (23 - BINARY_SHIFT)

HINGE_TOP = 0x7F7FFFFF >> BINARY_SHIFT
"""The leading bits of the errors in the first cell, which holds the largest finite error."""
HINGE_CELLS = HINGE_TOP + 1 - (127 - 24) * _CELLS_PER_OCTAVE
"""The number of cells, down to errors of 2^-24: 1 - s x is 0 or not smaller than that."""

SIGMOID_TOP = 127 * _CELLS_PER_OCTAVE
"""The leading bits of the errors in the first cell, which holds 1, the largest error."""
SIGMOID_CELLS = SIGMOID_TOP + 1 - _CELLS_PER_OCTAVE
"""The number of cells, down to the smallest normal float."""

SORTED_PIXELS = 4096
"""The most pixels of a group without tables, each of whose segments is sorted by one kernel instance."""

STOP_BITS = 5
"""The low bits of a map's integers. An integer is (the end of the cell's bins) x 2^STOP_BITS + (the number of low bits
of a float that do not influence its bin)."""

FULL_PIXELS = 1 << 18
"""Smaller groups have proportionally fewer bins, as their pixels are sorted after all, bucket by bucket."""
SMALLEST_BITS = 3
NEAR_1_BITS = 13
"""log2 of the least number of bins of [1/2, 1), where a trained network has many errors that make most of the loss."""


def coarser_by(pixels: int) -> int:
    """log2 of the factor by which a group of this many pixels has fewer bins than a large group."""
    return max(0, math.ceil(math.log2(FULL_PIXELS / pixels)))


def softmax_map(coarser: int) -> npt.NDArray[np.int32]:
    """The map of softmax errors: int32, one element per octave. It does not include the last bin of the table."""
    bits = np.maximum(np.array(_CELL_BITS) - coarser, SMALLEST_BITS)
    bits[0], bits[1] = _CELL_BITS[0], max(bits[1], NEAR_1_BITS)
    stops = np.cumsum(1 << bits)
    return (stops << STOP_BITS | (SOFTMAX_SHIFT - bits)).astype(np.int32)


@cache
def softmax_bins(coarser: int) -> int:
    return int(softmax_map(coarser)[-1] >> STOP_BITS) + 1


def binary_bins(coarser: int) -> int:
    """The number of bins of a segment's table, for a binary loss.

    Half of the bins are shared out in proportion to pixels; the other half suffices for one bin per cell with a pixel.
    """
    return BINARY_BINS >> max(0, coarser - 3)


def binary_cells(*, is_sigmoid: bool) -> tuple[int, int]:
    """(the leading bits of the errors in the first cell, the number of cells) of a binary loss."""
    return (SIGMOID_TOP, SIGMOID_CELLS) if is_sigmoid else (HINGE_TOP, HINGE_CELLS)
