"""The exact Lovász extension of one segment, by sorting: for groups so small that a table would cost more."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numpy import int32 as i32
from numpy import uint64 as u64

from lovasz.core.backends.numba.intrinsics import bits_float, compiled, float_bits
from lovasz.core.backends.numba.planes import Codes, Floats

Keys = npt.NDArray[np.uint64]

_DIGIT_BITS = 11
_DIGITS = 1 << _DIGIT_BITS
_PASSES = 3
_POSITION_BITS = 31
"""The low bits of a key. A key is, from the top: the error, inverted for descending order (32 bits); 0 for foreground,
1 for background (1 bit); the position (31 bits). The bits above the position are three digits. Each pass sorts by one
digit and is stable, so keys with equal digits keep their order."""

_BACKGROUND, _POSITION = u64(1 << _POSITION_BITS), u64((1 << _POSITION_BITS) - 1)
_MOST = i32(0x7FFFFFFF)

_FEW = 48
"""The most keys that are sorted by insertion."""

_BLOCK_PIXELS = 1024


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
        g: float32, shape (P,); shape (0,) if no gradient is wanted.
    """
    wanted = len(g) > 0
    foreground_count, kept = _select(errors, codes, foreground, void, ignored, keys)
    if kept <= _FEW:
        _insert(keys[:kept])
        in_order = keys
    else:
        in_order = _radix(keys[:kept], other_keys[:kept])
    g[:] = np.float32(0)
    # N = G - n and x = G + b before the pixel, as integers in float64. One division a pixel, and no branch.
    loss, left, x, over_x = 0.0, float(foreground_count), float(foreground_count), 1.0 / foreground_count
    for place in range(kept):
        key = in_order[place]
        error = bits_float(_MOST - i32(key >> u64(32)))
        is_background = key & _BACKGROUND != u64(0)
        over_next = 1.0 / (x + 1.0)
        gradient = left * over_x * over_next if is_background else over_x
        weighted = (weight if is_background else foreground_weight) * gradient
        left -= 0.0 if is_background else 1.0
        x += 1.0 if is_background else 0.0
        over_x = over_next if is_background else over_x
        loss += error * gradient
        if wanted:
            g[np.int64(key & _POSITION)] = 0.0 if cut and error == np.float32(0) else weighted
    return loss


@compiled
def _select(errors: Floats, codes: Codes, foreground: int, void: int, ignored: int, keys: Keys) -> tuple[int, int]:
    """Writes the keys of the foreground, and of the background above its smallest error; returns (G, number of keys).

    Every pixel's key is written, and then overwritten by the next one's unless it is kept: a branch that depends on
    errors would be mispredicted, which takes longer.
    """
    smallest, foreground_count = _MOST, i32(0)
    for i in range(len(errors)):
        is_foreground = codes[i] == foreground
        smallest = min(smallest, float_bits(errors[i]) if is_foreground else _MOST)
        foreground_count = i32(foreground_count + (i32(1) if is_foreground else i32(0)))
    high, low = np.empty(_BLOCK_PIXELS, np.uint32), np.empty(_BLOCK_PIXELS, np.uint32)
    takes, kept = np.empty(_BLOCK_PIXELS, np.uint8), u64(0)
    for first in range(0, len(errors), _BLOCK_PIXELS):
        n = min(_BLOCK_PIXELS, len(errors) - first)
        error, code = errors[first : first + n], codes[first : first + n]
        upper, lower, take = high[:n], low[:n], takes[:n]
        for i in range(n):
            upper[i] = np.uint32(i32(_MOST - float_bits(error[i])))
        for i in range(n):
            background = np.uint32(0) if code[i] == foreground else np.uint32(_BACKGROUND)
            lower[i] = np.uint32(np.uint32(first + i) | background)
        for i in range(n):
            counts = (code[i] != void) & (code[i] != ignored) & (float_bits(error[i]) > smallest)
            take[i] = np.uint8(1) if counts | (code[i] == foreground) else np.uint8(0)
        for i in range(n):
            keys[kept] = (u64(upper[i]) << u64(32)) | u64(lower[i])
            kept += u64(take[i])
    return foreground_count, np.int64(kept)


@compiled
def largest(errors: Floats, codes: Codes, void: int, ignored: int, weight: float, cut: bool, g: Floats) -> float:
    """Like ``extension``, for a segment without foreground: g is 1 at the first largest error and 0 elsewhere."""
    place, value = -1, np.float32(-1)
    for i in range(len(errors)):
        if len(g) > 0:
            g[i] = np.float32(0)
        if codes[i] != void and codes[i] != ignored and errors[i] > value:
            place, value = i, errors[i]
    if len(g) > 0 and place >= 0 and not (cut and value == np.float32(0)):
        g[place] = weight
    return float(value) if place >= 0 else 0.0


@compiled
def _insert(keys: Keys) -> None:
    for i in range(1, len(keys)):
        key, j = keys[i], i
        while j > 0 and keys[j - 1] > key:
            keys[j] = keys[j - 1]
            j -= 1
        keys[j] = key


@compiled
def _radix(keys: Keys, other: Keys) -> Keys:
    """Sorts by the bits above the position, with one stable pass per digit.

    Returns:
        The array that holds the result: ``keys`` or ``other``.
    """
    counts = np.zeros((_PASSES, _DIGITS), np.int64)
    for i in range(len(keys)):
        for digit in range(_PASSES):
            shift = u64(_POSITION_BITS + digit * _DIGIT_BITS)
            counts[digit, np.int64((keys[i] >> shift) & u64(_DIGITS - 1))] += 1
    for digit in range(_PASSES):
        shift = u64(_POSITION_BITS + digit * _DIGIT_BITS)
        if counts[digit, np.int64((keys[0] >> shift) & u64(_DIGITS - 1))] == len(keys):
            continue
        place = 0
        for value in range(_DIGITS):
            place, counts[digit, value] = place + counts[digit, value], place
        for i in range(len(keys)):
            value = np.int64((keys[i] >> shift) & u64(_DIGITS - 1))
            other[counts[digit, value]] = keys[i]
            counts[digit, value] += 1
        keys, other = other, keys
    return keys
