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

_FEW = 48
"""The most keys that are sorted by insertion."""


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
    pixels = len(errors)
    wanted = len(g) > 0
    foreground_count, smallest = 0, np.float32(np.inf)
    for i in range(pixels):
        if codes[i] == foreground:
            foreground_count += 1
            smallest = min(smallest, errors[i])
    kept = 0
    for i in range(pixels):
        if wanted:
            g[i] = np.float32(0)
        is_foreground = codes[i] == foreground
        out = codes[i] == void or codes[i] == ignored
        if is_foreground or (not out and errors[i] > smallest):
            descending = u64(i32(0x7FFFFFFF) - float_bits(errors[i]))
            keys[kept] = (descending << u64(32)) | (u64(0 if is_foreground else 1) << u64(_POSITION_BITS)) | u64(i)
            kept += 1
    if kept <= _FEW:
        _insert(keys[:kept])
        in_order = keys
    else:
        in_order = _radix(keys[:kept], other_keys[:kept])
    loss, n, x = 0.0, 0, np.int64(foreground_count)  # x = G + background so far
    for place in range(kept):
        key = in_order[place]
        error = bits_float(i32(0x7FFFFFFF) - i32(key >> u64(32)))
        if (key >> u64(_POSITION_BITS)) & u64(1):
            gradient = float(foreground_count - n) / x / (x + 1)
            x += 1
            weighted = weight * gradient
        else:
            gradient = 1.0 / x
            n += 1
            weighted = foreground_weight * gradient
        loss += error * gradient
        if wanted:
            g[np.int64(key & u64((1 << _POSITION_BITS) - 1))] = 0.0 if cut and error == np.float32(0) else weighted
    return loss


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
