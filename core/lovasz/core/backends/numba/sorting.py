"""The exact Lovász extension of one segment, by sorting: for groups so small that a table would cost more."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numpy import int32 as i32
from numpy import uint64 as u64

from lovasz.core.backends.numba.elementary import ordered_sum
from lovasz.core.backends.numba.intrinsics import (
    MASK_BITS,
    bits_between,
    bits_float,
    compiled,
    float_bits,
    inlined,
    lowest_bit,
)
from lovasz.core.backends.numba.planes import Codes, Floats

Keys = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int32]
"""Pixels of a segment, counted from its first one."""

_POSITION_BITS = 31
"""The low bits of a key. A key is, from the top: the error, inverted for descending order (32 bits); 0 for foreground,
1 for background (1 bit); the position (31 bits). Keys are sorted by digits of the bits above the position. Each pass
sorts by one digit and is stable, so keys with equal digits keep their order."""
_DIGIT_BITS = 11
"""The most bits of a digit."""

_BACKGROUND, _POSITION = u64(1 << _POSITION_BITS), u64((1 << _POSITION_BITS) - 1)
_MOST, _SIGN = i32(0x7FFFFFFF), i32(-0x80000000)

_FEW = 48
"""The most keys that are sorted by insertion alone."""
_MOVES = 4
"""The most moves per key of the insertion that ends a sort by two digits."""

_BLOCK_PIXELS = 1024
_BLOCK_KEYS = 256


@compiled
def extension(
    errors: Floats,
    codes: Codes,
    foreground: int,
    void: int,
    ignored: int,
    weight: float,
    foreground_weight: float,
    cut: bool,
    keys: Keys,
    other_keys: Keys,
    g: Floats,
) -> float:
    """Writes the gradient of a segment, times the weights, to ``g`` and returns its loss.

    Sorts the foreground and the background above the smallest foreground error; for other background g is 0. Among
    equal errors foreground comes first, then the order of the pixels decides.

    Args:
        errors: float32, shape (P,), at least 0.
        foreground, void, ignored: as for :func:`lovasz.core.backends.numba.tables.count`.
        weight, foreground_weight: the factors of the gradient of background and foreground.
        cut: whether a pixel with error 0 gets gradient 0, as for the hinge.
        keys, other_keys: memory for P keys each.
        g: float32, shape (P,), may be the memory of ``errors``; shape (0,) if no gradient is wanted.
    """
    smallest, foreground_count = _smallest(errors, codes, foreground)
    kept = select(errors, codes, foreground, void, ignored, smallest, cut, keys)
    in_order, free = sort(keys[:kept], other_keys[:kept])
    g[:] = np.float32(0)
    losses = free.view(np.float64)
    return rank(in_order, 0, 0, foreground_count, weight, foreground_weight, cut, losses, g)


@compiled
def rank(
    in_order: Keys,
    before: int,
    foreground_before: int,
    foreground_count: int,
    weight: float,
    foreground_weight: float,
    cut: bool,
    losses: npt.NDArray[np.float64],
    g: Floats,
) -> float:
    """Writes the gradients of consecutive keys of a segment's order, and what each adds to the loss.

    Args:
        before, foreground_before: the number of keys before them, and how many of these are foreground.
        losses: float64, one element per key.
        g: as for ``extension``.

    Returns:
        The sum of ``losses``: if these are all keys of the segment, its loss.
    """
    behind, gradients = np.empty(_BLOCK_KEYS, np.int32), np.empty(_BLOCK_KEYS)
    total, n = 0.0, i32(foreground_before)
    for first in range(0, len(in_order), _BLOCK_KEYS):
        key = in_order[first : min(first + _BLOCK_KEYS, len(in_order))]
        loss, place = losses[first : first + len(key)], i32(before + first)
        for i in range(len(key)):
            behind[i] = n
            n = i32(n + (i32(1) if key[i] & _BACKGROUND == u64(0) else i32(0)))
        for i in range(len(key)):
            is_background = key[i] & _BACKGROUND != u64(0)
            error = bits_float(i32(_MOST - i32(np.uint32(key[i] >> u64(32)))))
            # G - n and G + b before the pixel. One division a pixel, and no branch.
            left = np.float64(i32(foreground_count - behind[i]))
            x = np.float64(i32(i32(foreground_count + i32(place + i)) - behind[i]))
            gradient = (left if is_background else 1.0) / (x * (x + 1.0) if is_background else x)
            loss[i] = error * gradient
            weighted = (weight if is_background else foreground_weight) * gradient
            gradients[i] = 0.0 if cut and error == np.float32(0) else weighted
        total += ordered_sum(loss)
        if len(g) > 0:
            for i in range(len(key)):
                g[np.int64(key[i] & _POSITION)] = gradients[i]
    return total


@compiled
def sum_of_losses(losses: npt.NDArray[np.float64]) -> float:
    """What ``rank`` returns for all keys of a segment, from the ``losses`` that it has written for some at a time."""
    loss = 0.0
    for first in range(0, len(losses), _BLOCK_KEYS):
        loss += ordered_sum(losses[first : min(first + _BLOCK_KEYS, len(losses))])
    return loss


@compiled
def _smallest(errors: Floats, codes: Codes, foreground: int) -> tuple[int, int]:
    """The bits of the smallest foreground error, and the number of foreground pixels."""
    smallest, foreground_count, foreground_code = _MOST, i32(0), i32(foreground)
    for i in range(len(errors)):
        is_foreground = i32(codes[i]) == foreground_code
        smallest = min(smallest, float_bits(errors[i]) if is_foreground else _MOST)
        foreground_count = i32(foreground_count + (i32(1) if is_foreground else i32(0)))
    return smallest, foreground_count


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
        keys: as for ``extension``.
    """
    foreground_code, void_code, ignored_code = i32(foreground), i32(void), i32(ignored)
    floor, foreground_floor = i32(smallest), i32(0) if cut else i32(-1)
    takes, places = np.empty(_BLOCK_PIXELS, np.uint8), np.empty(_BLOCK_PIXELS, np.uint16)
    kept = 0
    for first in range(0, len(errors), _BLOCK_PIXELS):
        n = min(_BLOCK_PIXELS, len(errors) - first)
        error, code, take = errors[first : first + n], codes[first : first + n], takes[:n]
        for i in range(n):
            own = i32(code[i])
            below = foreground_floor if own == foreground_code else floor
            counts = (own != void_code) & (own != ignored_code) & (float_bits(error[i]) > below)
            take[i] = np.uint8(1) if counts else np.uint8(0)
        own_keys = keys[kept : kept + _find(take, places)]
        for j in range(len(own_keys)):
            i = places[j]
            inverted = u64(np.uint32(i32(_MOST - float_bits(error[i]))))
            background = np.uint32(0) if i32(code[i]) == foreground_code else np.uint32(_BACKGROUND)
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
            values[kept] = bits_float(bits | _SIGN if own == foreground_code else bits)
            places[kept] = first + i
            kept += 1 if (own != void_code) & (own != ignored_code) else 0
    return kept


@compiled
def write_keys(values: Floats, keys: Keys) -> None:
    """Writes the keys of the ``values`` that ``select_window`` writes; their positions are counted among these."""
    for i in range(len(values)):
        bits = float_bits(values[i])
        background = np.uint32(0) if bits < i32(0) else np.uint32(_BACKGROUND)
        inverted = u64(np.uint32(i32(_MOST - i32(bits & _MOST))))
        keys[i] = (inverted << u64(32)) | u64(np.uint32(np.uint32(i) | background))


@compiled
def _find(takes: npt.NDArray[np.uint8], places: npt.NDArray[np.uint16]) -> int:
    """Writes the places of the elements that are 1, the others being 0; returns how many. Has no branch to mispredict.

    Args:
        places: at least as many elements.
    """
    found = np.uint32(0)
    for i in range(len(takes)):
        places[found] = np.uint16(i)
        found = np.uint32(found + np.uint32(takes[i]))
    return np.int64(found)


@compiled
def renumber(keys: Keys, first: int, positions: npt.NDArray[np.uint16]) -> None:
    """Gives keys the positions ``first`` and following, and writes those that they had before; these are below 2^16."""
    for i in range(len(keys)):
        positions[i] = np.uint16(keys[i] & _POSITION)
    for i in range(len(keys)):
        keys[i] = (keys[i] & ~_POSITION) | u64(first + i)


@compiled
def select_range(keys: Keys, low: np.uint64, high: np.uint64, out: Keys) -> int:
    """Copies the keys that are in [low, high) to ``out``; returns how many."""
    takes, places = np.empty(_BLOCK_PIXELS, np.uint8), np.empty(_BLOCK_PIXELS, np.uint16)
    kept = 0
    for first in range(0, len(keys), _BLOCK_PIXELS):
        n = min(_BLOCK_PIXELS, len(keys) - first)
        key, take = keys[first : first + n], takes[:n]
        for i in range(n):
            take[i] = np.uint8(1) if (key[i] >= low) & (key[i] < high) else np.uint8(0)
        own = out[kept : kept + _find(take, places)]
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
        foreground += 1 if is_before & (keys[i] & _BACKGROUND == u64(0)) else 0
    return count, foreground


@compiled
def largest(errors: Floats, codes: Codes, void: int, ignored: int, weight: float, cut: bool, g: Floats) -> float:
    """Like ``extension``, for a segment without foreground: g is 1 at the first largest error and 0 elsewhere."""
    place, value = -1, np.float32(-1)
    for i in range(len(errors)):
        if codes[i] != void and codes[i] != ignored and errors[i] > value:
            place, value = i, errors[i]
    g[:] = np.float32(0)  # Only now: ``g`` may be the memory of ``errors``.
    if len(g) > 0 and place >= 0 and not (cut and value == np.float32(0)):
        g[place] = weight
    return float(value) if place >= 0 else 0.0


@compiled
def sort(keys: Keys, other: Keys) -> tuple[Keys, Keys]:
    """Sorts by the bits above the position.

    The two leading digits of the range of keys tell almost all keys apart, so few are left to be moved. Where they do
    not, all digits are sorted by.

    Returns:
        ``keys`` and ``other``, the one that holds the result first.
    """
    n = len(keys)
    if n <= _FEW:
        _insert(keys, n * n)
        return keys, other
    lowest, highest = keys[0], keys[0]
    for i in range(n):
        lowest, highest = min(lowest, keys[i]), max(highest, keys[i])
    lowest &= ~_POSITION
    digit_bits = min((_bit_length(u64(n)) + 6) >> 1, _DIGIT_BITS)
    shift = _POSITION_BITS + max(_bit_length(highest - lowest) - _POSITION_BITS - 2 * digit_bits, 0)
    places, upper_places = np.zeros(1 << digit_bits, np.int32), np.zeros(1 << digit_bits, np.int32)
    by, upper_by, mask = u64(shift), u64(shift + digit_bits), u64((1 << digit_bits) - 1)
    for i in range(n):
        offset = keys[i] - lowest
        places[(offset >> by) & mask] += i32(1)
        upper_places[(offset >> upper_by) & mask] += i32(1)
    _move(keys, other, lowest, shift, places)
    _move(other, keys, lowest, shift + digit_bits, upper_places)
    if shift == _POSITION_BITS or _insert(keys, _MOVES * n):
        return keys, other
    for shift in range(_POSITION_BITS, 64, _DIGIT_BITS):
        places = np.zeros(1 << _DIGIT_BITS, np.int32)
        for i in range(n):
            places[(keys[i] >> u64(shift)) & u64((1 << _DIGIT_BITS) - 1)] += i32(1)
        _move(keys, other, u64(0), shift, places)
        keys, other = other, keys
    return keys, other


@compiled
def _move(keys: Keys, out: Keys, lowest: np.uint64, shift: int, places: npt.NDArray[np.int32]) -> None:
    """Writes the keys to ``out`` in the order of one digit of (key - lowest), whose lowest bit is the bit ``shift``.

    Args:
        places: how many keys have each digit; overwritten. Its length is a power of two.
    """
    by, mask, place = u64(shift), u64(len(places) - 1), i32(0)
    for digit in range(len(places)):
        place, places[digit] = i32(place + places[digit]), place
    for i in range(len(keys)):
        key = keys[i]
        digit = ((key - lowest) >> by) & mask
        place = places[digit]
        out[np.uint32(place)] = key
        places[digit] = i32(place + i32(1))


@compiled
def _insert(keys: Keys, most_moves: int) -> bool:
    """Sorts keys whose order is almost right; returns whether that took at most this many moves, else gives up."""
    for i in range(1, len(keys)):
        key = keys[i]
        if keys[i - 1] > key:
            j = i
            while j > 0 and keys[j - 1] > key:
                keys[j] = keys[j - 1]
                j -= 1
            keys[j] = key
            most_moves -= i - j
            if most_moves < 0:
                return False
    return True


@inlined
def _bit_length(value: np.uint64) -> int:
    bits = 0
    while value > u64(0):
        value, bits = value >> u64(1), bits + 1
    return bits
