"""What the pixels of a segment are sorted by."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numpy import int32 as i32
from numpy import uint64 as u64

from lovasz.core.backends.numba.intrinsics import compiled, float_bits
from lovasz.core.backends.numba.planes import Floats

Keys = npt.NDArray[np.uint64]
"""A key is, from the top: the error, inverted for descending order (32 bits); 0 for foreground, 1 for background (1
bit); the position (31 bits). The position is not sorted by."""

POSITION_BITS = 31
BACKGROUND, POSITION = u64(1 << POSITION_BITS), u64((1 << POSITION_BITS) - 1)
MOST, SIGN = i32(0x7FFFFFFF), i32(-0x80000000)
"""The most that the bits of an error can be, and the bit that marks foreground among ``selecting.select_window``'s."""


@compiled
def write_keys(values: Floats, keys: Keys) -> None:
    """Writes the keys of the ``values`` that ``select_window`` writes; their positions are counted among these."""
    for i in range(len(values)):
        bits = float_bits(values[i])
        background = np.uint32(0) if bits < i32(0) else np.uint32(BACKGROUND)
        inverted = u64(np.uint32(i32(MOST - i32(bits & MOST))))
        keys[i] = (inverted << u64(32)) | u64(np.uint32(np.uint32(i) | background))


@compiled
def renumber(keys: Keys, first: int, positions: npt.NDArray[np.uint16]) -> None:
    """Gives keys the positions ``first`` and following, and writes those that they had before; these are below 2^16."""
    for i in range(len(keys)):
        positions[i] = np.uint16(keys[i] & POSITION)
    for i in range(len(keys)):
        keys[i] = (keys[i] & ~POSITION) | u64(first + i)
