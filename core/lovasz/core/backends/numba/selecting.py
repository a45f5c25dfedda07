"""Which pixels of a segment matter: they are found and listed, to be sorted."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numpy import int32 as i32
from numpy import uint64 as u64

from lovasz.core.backends.numba.intrinsics import (
    LISTED,
    MASK_BITS,
    bits_between,
    bits_float,
    bits_set,
    compiled,
    float_bits,
    list_places,
    lowest_bit,
)
from lovasz.core.backends.numba.keys import BACKGROUND, MOST, SIGN, Keys
from lovasz.core.backends.numba.planes import Codes, Floats

Places = npt.NDArray[np.int32]
"""Pixels of a segment, counted from its first one."""

_BLOCK_PIXELS = 1024
_PLACES = _BLOCK_PIXELS + LISTED
"""Room for the places in a block: ``list_places`` writes some more than there are."""
_TO_MASK = u64(0x0102040810204080)
"""This times eight bytes, each 0 or 1, has the byte i as the bit 56 + i."""


@compiled
def smallest_foreground(errors: Floats, codes: Codes, foreground: int) -> int:
    """The bits of the smallest foreground error."""
    smallest, foreground_code = MOST, i32(foreground)
    for i in range(len(errors)):
        smallest = min(smallest, float_bits(errors[i]) if i32(codes[i]) == foreground_code else MOST)
    return int(smallest)


@compiled
def select(
    errors: Floats,
    codes: Codes,
    foreground: int,
    void: int,
    ignored: int,
    smallest: int,
    cut: bool,
    keys: Keys,
) -> int:
    """Writes the keys of the foreground, and of background with larger errors than ``smallest``; returns their number.

    With ``cut``, foreground with error 0 is left out: it adds nothing, and comes after all that does.

    Args:
        smallest: the bits of an error.
        keys: memory for as many keys as there are pixels.
    """
    foreground_code, void_code, ignored_code = i32(foreground), i32(void), i32(ignored)
    floor, foreground_floor = i32(smallest), i32(0) if cut else i32(-1)
    takes, places = np.empty(_BLOCK_PIXELS, np.uint8), np.empty(_PLACES, np.uint16)
    kept = 0
    for first in range(0, len(errors), _BLOCK_PIXELS):
        n = min(_BLOCK_PIXELS, len(errors) - first)
        error, code, take = errors[first : first + n], codes[first : first + n], takes[:n]
        for i in range(n):
            own = i32(code[i])
            below = foreground_floor if own == foreground_code else floor
            counts = (own != void_code) & (own != ignored_code) & (float_bits(error[i]) > below)
            take[i] = np.uint8(1) if counts else np.uint8(0)
        own_keys = keys[kept : kept + _find(takes, n, places)]
        for j in range(len(own_keys)):
            i = places[j]
            inverted = u64(np.uint32(i32(MOST - float_bits(error[i]))))
            background = np.uint32(0) if i32(code[i]) == foreground_code else np.uint32(BACKGROUND)
            own_keys[j] = (inverted << u64(32)) | u64(np.uint32(np.uint32(first + i) | background))
        kept += len(own_keys)
    return kept


@compiled
def are_few(errors: Floats, codes: Codes, void: int, ignored: int, floor: int, few: int) -> bool:
    """Whether at most so many pixels have errors whose bits are above ``floor``."""
    void_code, ignored_code, lowest, found = i32(void), i32(ignored), i32(floor), 0
    for first in range(0, len(errors), _BLOCK_PIXELS):
        n, count = min(_BLOCK_PIXELS, len(errors) - first), i32(0)
        error, code = errors[first : first + n], codes[first : first + n]
        for i in range(n):
            own = i32(code[i])
            counts = (own != void_code) & (own != ignored_code) & (float_bits(error[i]) > lowest)
            count = i32(count + (i32(1) if counts else i32(0)))
        found += count
        if found > few:
            break
    return found <= few


@compiled
def select_window(
    errors: Floats,
    codes: Codes,
    foreground: int,
    void: int,
    ignored: int,
    floor: int,
    ceiling: int,
    first: int,
    values: Floats,
    places: Places,
) -> int:
    """Writes the errors whose bits are in (floor, ceiling], with the sign bit set for foreground, and their places.

    It ends early if ``values`` are full.

    Args:
        first: the place of the first pixel.
        places: at least as many elements as ``values``.

    Returns:
        How many are written.
    """
    foreground_code, void_code, ignored_code, kept = i32(foreground), i32(void), i32(ignored), 0
    for begin in range(0, len(errors), MASK_BITS):
        found = bits_between(errors, begin, i32(floor), i32(ceiling))
        while found != u64(0) and kept < len(values):
            i = begin + lowest_bit(found)
            found &= found - u64(1)
            own, bits = i32(codes[i]), float_bits(errors[i])
            values[kept] = bits_float(bits | SIGN if own == foreground_code else bits)
            places[kept] = first + i
            kept += 1 if (own != void_code) & (own != ignored_code) else 0
    return kept


@compiled
def _find(takes: npt.NDArray[np.uint8], n: int, places: npt.NDArray[np.uint16]) -> int:
    """Writes the places of the elements that are 1, of the first n, the others being 0; returns how many.

    Args:
        takes: ``_BLOCK_PIXELS`` elements; some after the first n are overwritten.
        places: ``_PLACES`` elements.
    """
    rest = -n % LISTED
    takes[n : n + rest] = np.uint8(0)
    eights, found = takes[: n + rest].view(np.uint64), u64(0)
    for i in range(len(eights)):
        mask = (eights[i] * _TO_MASK) >> u64(56)
        list_places(places, found, mask, np.uint16(LISTED * i))
        found += bits_set(mask)
    return np.int64(found)


@compiled
def select_range(keys: Keys, low: np.uint64, high: np.uint64, out: Keys) -> int:
    """Copies the keys that are in [low, high) to ``out``; returns how many."""
    takes, places = np.empty(_BLOCK_PIXELS, np.uint8), np.empty(_PLACES, np.uint16)
    kept = 0
    for first in range(0, len(keys), _BLOCK_PIXELS):
        n = min(_BLOCK_PIXELS, len(keys) - first)
        key, take = keys[first : first + n], takes[:n]
        for i in range(n):
            take[i] = np.uint8(1) if (key[i] >= low) & (key[i] < high) else np.uint8(0)
        own = out[kept : kept + _find(takes, n, places)]
        for j in range(len(own)):
            own[j] = key[places[j]]
        kept += len(own)
    return kept


@compiled
def count_before(keys: Keys, low: u64) -> tuple[int, int]:
    """(keys, foreground keys) that are below ``low``: they come first."""
    count, foreground = 0, 0
    for i in range(len(keys)):
        is_before = keys[i] < low
        count += 1 if is_before else 0
        foreground += 1 if is_before & (keys[i] & BACKGROUND == u64(0)) else 0
    return count, foreground
