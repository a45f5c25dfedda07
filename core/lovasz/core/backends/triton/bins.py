"""Which bins the tables of a GPU have.

A bin is a run of floats. A *map* says which: errors are cut by the leading bits of their float into coarse cells of
2^SHIFT floats, and the cell's entry says how many bins it has, all equally wide, and where they end. Bins stand in
descending order of the error. What lies in no cell shares the last bin.

Softmax has fixed cells, the octaves (SHIFT 23): errors are at most 1, and smaller ones weigh less in the gradient. The
hinge's errors have any scale and all weigh alike, so its cells (SHIFT 15: 256 an octave) get bins in proportion to the
pixels that a first sweep has counted in them (``hinge.share_out``). Why so many: docs/mathematics.md, section 11.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

SOFTMAX_SHIFT = 23
SOFTMAX_TOP = 127
"""The leading bits of the largest errors, and so the first cell: of [1, 2)."""
_CELL_BITS = (11, *[14] * 2, *[13] * 2, *[11] * 16, *[8] * 8, *[6] * 14, *[5] * 22, *[4] * 62)
"""log2 of the bins of each octave, in groups of 2^18 pixels and more."""
SOFTMAX_CELLS = len(_CELL_BITS)

HINGE_SHIFT = 15
HINGE_TOP = 0x7F7FFFFF >> HINGE_SHIFT
"""Of the largest finite error."""
HINGE_CELLS = HINGE_TOP + 1 - ((127 - 24) << (23 - HINGE_SHIFT))
"""Down to 2^-24: 1 - s x is 0 or no smaller."""
HINGE_BINS = 1 << 17

STOP_BITS = 5
"""A map's entry is where the cell's bins end, times 2^STOP_BITS, plus the bits of a float that its bins leave out."""

FULL_PIXELS = 1 << 18
"""Smaller groups have coarser bins, in proportion; their pixels are ranked one by one in the end."""
SMALLEST_BITS = 3
NEAR_1_BITS = 13
"""At least so many of the octave below 1, where the errors of a trained network crowd, and where the loss is made."""


def coarser_by(pixels: int) -> int:
    """By how many bits the bins of a group of so many pixels are coarser."""
    return max(0, math.ceil(math.log2(FULL_PIXELS / pixels)))


def softmax_map(coarser: int) -> npt.NDArray[np.int32]:
    """The map of softmax errors, int32, one entry an octave; the last of its bins, for all others, comes on top."""
    bits = np.maximum(np.array(_CELL_BITS) - coarser, SMALLEST_BITS)
    bits[0], bits[1] = _CELL_BITS[0], max(bits[1], NEAR_1_BITS)
    stops = np.cumsum(1 << bits)
    return (stops << STOP_BITS | (SOFTMAX_SHIFT - bits)).astype(np.int32)


def softmax_bins(coarser: int) -> int:
    return int(softmax_map(coarser)[-1] >> STOP_BITS) + 1


def hinge_bins(coarser: int) -> int:
    """Half of them are shared out in proportion; one for each cell with a pixel has to be left."""
    return HINGE_BINS >> max(0, coarser - 3)
