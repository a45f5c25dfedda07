"""The exact Lovász extension of one segment, by sorting: for groups so small that a table would cost more."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numpy import int32 as i32
from numpy import uint64 as u64

from lovasz.core.backends.numba.elementary import ordered_sum
from lovasz.core.backends.numba.intrinsics import bits_float, compiled, inlined
from lovasz.core.backends.numba.keys import BACKGROUND, MOST, POSITION, POSITION_BITS, Keys
from lovasz.core.backends.numba.planes import Codes, Floats
from lovasz.core.backends.numba.selecting import select

_DIGIT_BITS = 11
"""Keys are sorted by digits of at most so many bits. Each pass sorts by one digit and is stable, so keys with equal
digits keep their order."""

_FEW = 48
"""The most keys that are sorted by insertion alone."""
_MOVES = 4
"""The most moves per key of the insertion that ends a sort by two digits."""

_BLOCK_KEYS = 256


@compiled
def extension(
    errors: Floats,
    codes: Codes,
    foreground: int,
    void: int,
    ignored: int,
    smallest: int,
    foreground_count: int,
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
        foreground, void, ignored: as in :class:`lovasz.core.backends.numba.tables.Pixels`.
        smallest: ``selecting.smallest_foreground``.
        foreground_count: the number of foreground pixels, at least one.
        weight, foreground_weight: the factors of the gradient of background and foreground.
        cut: whether a pixel with error 0 gets gradient 0, as for the hinge.
        keys, other_keys: memory for P keys each.
        g: float32, shape (P,), may be the memory of ``errors``; shape (0,) if no gradient is wanted.
    """
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
            n = i32(n + (i32(1) if key[i] & BACKGROUND == u64(0) else i32(0)))
        for i in range(len(key)):
            is_background = key[i] & BACKGROUND != u64(0)
            error = bits_float(i32(MOST - i32(np.uint32(key[i] >> u64(32)))))
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
                g[np.int64(key[i] & POSITION)] = gradients[i]
    return total


@compiled
def sum_of_losses(losses: npt.NDArray[np.float64]) -> float:
    """What ``rank`` returns for all keys of a segment, from the ``losses`` that it has written for some at a time."""
    loss = 0.0
    for first in range(0, len(losses), _BLOCK_KEYS):
        loss += ordered_sum(losses[first : min(first + _BLOCK_KEYS, len(losses))])
    return loss


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
    lowest &= ~POSITION
    digit_bits = min((_bit_length(u64(n)) + 6) >> 1, _DIGIT_BITS)
    shift = POSITION_BITS + max(_bit_length(highest - lowest) - POSITION_BITS - 2 * digit_bits, 0)
    places, upper_places = np.zeros(1 << digit_bits, np.int32), np.zeros(1 << digit_bits, np.int32)
    by, upper_by, mask = u64(shift), u64(shift + digit_bits), u64((1 << digit_bits) - 1)
    for i in range(n):
        offset = keys[i] - lowest
        places[(offset >> by) & mask] += i32(1)
        upper_places[(offset >> upper_by) & mask] += i32(1)
    _move(keys, other, lowest, shift, places)
    _move(other, keys, lowest, shift + digit_bits, upper_places)
    if shift == POSITION_BITS or _insert(keys, _MOVES * n):
        return keys, other
    for shift in range(POSITION_BITS, 64, _DIGIT_BITS):
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
