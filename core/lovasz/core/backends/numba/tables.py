"""The Lovász extension by counting: errors are counted in bins, and each pixel's gradient is looked up in its bin.

``bins`` defines the bins; docs/mathematics.md, section 11, derives the entries that the scan writes.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt
from numpy import float32 as f32
from numpy import int32 as i32

from lovasz.core.backends.numba import bins
from lovasz.core.backends.numba.elementary import ordered_sum
from lovasz.core.backends.numba.intrinsics import bits_double, compiled, float_bits, fma, inlined, pointer
from lovasz.core.backends.numba.planes import Codes, Floats, Integers, Planes
from lovasz.core.word import REST_BITS, REST_SUM_BITS

BINS = bins.BINS
_UNCOUNTED = 2 * BINS
_UNCOUNTED_WORDS = 16
WORDS = _UNCOUNTED + _UNCOUNTED_WORDS
"""The words of a table: one per bin for background, then for foreground, then some that pixels without a bin share. One
word for all of them would be slow: each addition to it would wait for the one before."""
_MAX_BITS, _MIN_BITS, _PER_BIT = bins.MAX_BITS, bins.MIN_BITS, bins.OCTAVES_PER_BIT
_OCTAVES, _REST_BITS, _REST_SUM_BITS = bins.OCTAVES, REST_BITS, REST_SUM_BITS
assert _PER_BIT == 3, "_coarser divides by 3"
assert _MAX_BITS + REST_BITS >= 23, "_rest shifts to the left"
_ONE = np.int64(1 << REST_SUM_BITS)
_FIRST_BINS = bins.FIRST_BINS

_BLOCK_PIXELS, _PART_PIXELS = 1024, 128
_DENSE_PIXELS = 8 * _BLOCK_PIXELS
"""Pixels are processed in blocks. Of a block most of whose parts have nothing to count, only the other parts are
processed. After a dense block, the next one that is looked at for this begins at a multiple of ``_DENSE_PIXELS``."""
_BLOCK_BINS = 256


# Each result is cast to 32 bits, of which a vector holds twice as many; Numba's integers have 64 bits otherwise.


@inlined
def _distance(error: f32, top_bits: i32) -> i32:
    """The number of floats from the error up to the largest of the top octave; any number >= 0 if it is not finite."""
    return max(i32(top_bits - float_bits(error)), i32(0))


@inlined
def _top_bits(top: int) -> i32:
    """The bits of the largest float of the top octave."""
    return i32(((top + 128) << 23) - 1)


@inlined
def _coarser(octave: i32) -> i32:
    """How many fewer bits the bins of this octave have than those of the top octave."""
    # octave // 3, as _PER_BIT is 3, without a division, which does not vectorize. It is off by one only where the
    # minimum applies.
    return min(i32(i32(octave * i32(43)) >> i32(7)), i32(_MAX_BITS - _MIN_BITS))


@inlined
def _bin(distance: i32) -> i32:
    octave = i32(distance >> i32(23))
    coarser = _coarser(octave)
    before = i32(i32(_PER_BIT) * i32(i32(2 << _MAX_BITS) - i32(i32(2 << _MAX_BITS) >> coarser)))
    before = i32(before + i32(i32(octave - i32(i32(_PER_BIT) * coarser)) << i32(i32(_MAX_BITS) - coarser)))
    place = i32(before + i32(i32(distance & i32(0x7FFFFF)) >> i32(i32(23 - _MAX_BITS) + coarser)))
    return i32(BINS - 1) if octave >= i32(_OCTAVES) else place


@inlined
def _rest(distance: i32) -> i32:
    octave = i32(distance >> i32(23))
    coarser = _coarser(octave)
    below = i32(distance & i32(i32(i32(1) << i32(i32(23 - _MAX_BITS) + coarser)) - i32(1)))
    rest = i32(i32(below << i32(_REST_BITS + _MAX_BITS - 23)) >> coarser)
    return i32(0) if octave >= i32(_OCTAVES) else rest


ALL_DISTANCES = (1 << 31) - 1


@compiled
def last_distance(errors: Floats, codes: Codes, foreground: int, top: int) -> int:
    """The largest distance in the bin of the smallest foreground error: background further away has g = 0."""
    most, top_bits, foreground_code = i32(0), _top_bits(top), i32(foreground)
    for i in range(len(errors)):
        most = max(most, _distance(errors[i], top_bits) if i32(codes[i]) == foreground_code else i32(0))
    octave = i32(most >> i32(23))
    if octave >= _OCTAVES:
        return ALL_DISTANCES
    return int(most | i32(i32(i32(1) << i32(i32(23 - _MAX_BITS) + _coarser(octave))) - i32(1)))


@compiled
def _is_sparse(
    errors: Floats, codes: Codes, foreground: i32, top_bits: i32, last: i32, counted: npt.NDArray[np.bool_]
) -> bool:
    """Writes which parts of a block have foreground or distances up to ``last``; returns whether at most half have."""
    parts = 0
    for first in range(0, len(errors), _PART_PIXELS):
        error, code = errors[first : first + _PART_PIXELS], codes[first : first + _PART_PIXELS]
        found = i32(0)
        for i in range(len(error)):
            found |= i32(1) if (_distance(error[i], top_bits) <= last) | (i32(code[i]) == foreground) else i32(0)
        counted[first // _PART_PIXELS] = found > 0
        parts += int(found)
    return 2 * parts * _PART_PIXELS <= len(errors)


@compiled
def count(
    errors: Floats,
    codes: Codes,
    foreground: int,
    void: int,
    ignored: int,
    cut: bool,
    top: int,
    last: int,
    table: Integers,
) -> tuple[int, int]:
    """Counts pixels in a segment's table: background in the first BINS words, foreground in the next BINS words.

    With ``cut``, pixels with error 0 are left out: they come last, and add nothing to the loss.

    Args:
        foreground: the code of the class.
        void: the code of pixels that are void for all terms.
        ignored: the code of further pixels that are void for this term; ``void`` if there are none.
        cut: whether a pixel with error 0 gets gradient 0, as for the hinge.
        top: the exponent of the first octave.
        last: pixels at larger distances are left out; the result of ``last_distance``, or ``ALL_DISTANCES``.
        table: ``WORDS`` words.

    Returns:
        (lowest, highest) bin that any pixel falls in.
    """
    places, rests = np.empty(_BLOCK_PIXELS, np.int32), np.empty(_BLOCK_PIXELS, np.int32)
    lowest, highest = i32(BINS), i32(-1)
    top_bits, foreground_code, void_code, ignored_code = _top_bits(top), i32(foreground), i32(void), i32(ignored)
    nothing = top_bits if cut else i32(-1)  # the distance of an error of 0
    last_counted, counted, is_sparse = i32(last), np.empty(_BLOCK_PIXELS // _PART_PIXELS, np.bool_), True
    for begin in range(0, len(errors), _BLOCK_PIXELS):
        end = min(begin + _BLOCK_PIXELS, len(errors))
        if is_sparse or begin % _DENSE_PIXELS == 0:
            is_sparse = _is_sparse(
                errors[begin:end], codes[begin:end], foreground_code, top_bits, last_counted, counted
            )
        step = _PART_PIXELS if is_sparse else _BLOCK_PIXELS
        for first in range(begin, end, step):
            if is_sparse and not counted[(first - begin) // _PART_PIXELS]:
                continue
            n = min(step, end - first)
            error, code = errors[first : first + n], codes[first : first + n]
            place, rest = places[:n], rests[:n]
            for i in range(n):
                distance = _distance(error[i], top_bits)
                found, own, uncounted = _bin(distance), i32(code[i]), i32(i32(_UNCOUNTED) + i32(i % _UNCOUNTED_WORDS))
                is_left_out = (distance == nothing) | (distance > last_counted)
                highest = max(highest, i32(-1) if is_left_out else found)
                lowest = min(lowest, found)
                found = i32(found + (i32(BINS) if own == foreground_code else i32(0)))
                found = uncounted if own == void_code else found
                found = uncounted if own == ignored_code else found
                place[i] = uncounted if is_left_out else found
                rest[i] = _rest(distance)
            for i in range(n):
                table[np.uint32(place[i])] += _ONE + np.int64(rest[i])
    return lowest, highest


@inlined
def _double(integer: np.int64) -> float:
    """An integer in [0, 2^52) as float64; the processor's own conversion does not vectorize."""
    return bits_double(integer | np.int64(0x4330000000000000)) - 4503599627370496.0


@compiled
def order_error(table: Integers, lowest: int, highest: int, foreground_count: int) -> float:
    """Estimates the error of the gradient, relative to its norm, that the unknown order inside bins causes.

    The table has been counted, but not scanned. Pixels of a bin are taken to be in random order: if k of them are
    background, the number of background pixels before another pixel of the bin is uncertain by sqrt(k / 6). The same
    holds for foreground.
    """
    left, union = np.float64(foreground_count), np.float64(foreground_count)
    over_union = 1.0 / union
    error, norm = 0.0, 0.0
    for i in range(lowest, min(highest + 1, BINS - 1)):
        background, foreground = table[i], table[BINS + i]
        if background == 0 and foreground == 0:
            continue
        k = _double(np.int64(np.uint64(background) >> np.uint64(_REST_SUM_BITS)))
        j = _double(np.int64(np.uint64(foreground) >> np.uint64(_REST_SUM_BITS)))
        union += k
        x, y = over_union, 1.0 / union
        mean_left = left - 0.5 * j
        steep = k * mean_left * x
        error += (x * x) * (x * x) * (j * k + 2.0 * (steep * steep))
        norm += x * y * (j + steep * mean_left * y)
        left -= j
        over_union = y
        if left <= 0.0:
            break
    return np.sqrt(error / (3.0 * norm)) if norm > 0.0 else 0.0


@compiled
def scan(
    table: Integers, lowest: int, highest: int, foreground_count: int, top: int, weight: float, foreground_weight: float
) -> float:
    """Overwrites each word with an entry, two float32 (a, s), from which a pixel's gradient is a - s x rest.

    Args:
        foreground_count: G.
        weight, foreground_weight: the factors of the gradient of background and foreground.

    Returns:
        The loss of the segment: the sum over bins of mean g x sum of errors.
    """
    loss = 0.0
    walked, room = np.empty((2, _BLOCK_BINS + 1), np.int64), np.empty((2, _BLOCK_BINS + 1))
    # G - n and G + b at the upper end of the next bin.
    left, union = np.int64(foreground_count), np.int64(foreground_count)
    for octave in range(bins.SPANS):
        largest, width, lost = _scale(octave, top)
        start, stop = _FIRST_BINS[octave], min(highest + 1, _FIRST_BINS[octave + 1])
        # Blocks always begin at the same bins, so that the sum does not depend on which bins are in use.
        skipped = max(lowest - start, 0) // _BLOCK_BINS * _BLOCK_BINS
        for first in range(start + skipped, stop, _BLOCK_BINS):
            if left == 0:  # After the last foreground pixel g is 0.
                table[first : highest + 1] = 0
                return loss
            last = min(first + _BLOCK_BINS, _FIRST_BINS[octave + 1])
            upper = largest - (first - start) * width - lost
            background, foreground = table[first:last], table[BINS + first : BINS + last]
            _walk(background, foreground, left, union, walked)
            left, union = walked[0, last - first], walked[1, last - first]
            loss += _fill_in(background, foreground, upper, width, weight, foreground_weight, walked, room)
    return loss


@compiled
def _walk(background: Integers, foreground: Integers, left: int, union: int, walked: npt.NDArray[np.int64]) -> None:
    """Writes G - n and G + b at the upper end of each bin, and at the lower end of the last bin."""
    lefts, unions = walked[0], walked[1]
    for i in range(len(background)):
        lefts[i], unions[i] = left, union
        left -= np.int64(np.uint64(foreground[i]) >> np.uint64(_REST_SUM_BITS))
        union += np.int64(np.uint64(background[i]) >> np.uint64(_REST_SUM_BITS))
    lefts[len(background)], unions[len(background)] = left, union


@compiled
def _fill_in(
    background: Integers,
    foreground: Integers,
    upper: float,
    width: float,
    weight: float,
    foreground_weight: float,
    walked: npt.NDArray[np.int64],
    room: npt.NDArray[np.float64],
) -> float:
    """Writes the entries of some bins of one octave; returns their part of the loss.

    Args:
        upper: the error at rest 0 in the first of these bins.
        width: the width of a bin.
        walked: the result of ``_walk``.
        room: memory, float64, two rows of at least one element more than bins.
    """
    n = len(background)
    lefts, unions, losses, over_union = walked[0], walked[1], room[0], room[1]
    unit, to_slope = width / (1 << _REST_BITS), 1.0 / (1 << _REST_BITS)
    for i in range(n + 1):
        over_union[i] = 1.0 / _double(unions[i])
    for i in range(n):
        x, y = over_union[i], over_union[i + 1]
        left, left_behind = _double(lefts[i]), _double(lefts[i + 1])
        k, rest = _unpack(background[i])
        mean = 0.5 * (left + left_behind) * x * y
        slope = min(left * x * x - left_behind * y * y, 2.0 * mean) * to_slope
        losses[i] = mean * (k * (upper - i * width) - rest * unit)
        mean_rest = np.float64(f32(rest) / f32(max(k, 1.0)))
        background[i] = _pack(weight * (mean + slope * mean_rest), weight * slope)
    for i in range(n):
        if foreground[i] != 0:  # Rare in most tables.
            x, y = over_union[i], over_union[i + 1]
            j, rest = _unpack(foreground[i])
            mean, slope = 0.5 * (x + y), (x - y) * to_slope
            losses[i] += mean * (j * (upper - i * width) - rest * unit)
            foreground[i] = _pack(foreground_weight * (mean + slope * (rest / j)), foreground_weight * slope)
    return ordered_sum(losses[:n])


@inlined
def _unpack(word: int) -> tuple[float, float]:
    """The two parts of a word: (pixels, sum of their rests)."""
    return _double(np.int64(np.uint64(word) >> np.uint64(_REST_SUM_BITS))), _double(word & (_ONE - 1))


@inlined
def _pack(a: float, s: float) -> int:
    """An entry: both numbers as float32 in 64 bits."""
    low = np.int64(float_bits(f32(a))) & np.int64(0xFFFFFFFF)
    return low | (np.int64(float_bits(f32(s))) << np.int64(32))


@inlined
def _scale(octave: int, top: int) -> tuple[float, float, float]:
    """(largest float of the octave, width of its bins, mean distance by which rests are rounded down)."""
    if octave == _OCTAVES:
        return 0.0, 0.0, 0.0
    bits = max(_MIN_BITS, _MAX_BITS - octave // _PER_BIT)
    lower = 2.0 ** (top - octave)
    ulp = lower / (1 << 23)
    coarser = 23 - bits - _REST_BITS
    lost = 0.5 * ((1 << coarser) - 1) * ulp if coarser > 0 else 0.0
    return 2.0 * lower - ulp, lower / (1 << bits), lost


@compiled
def clear(table: Integers, lowest: int, highest: int) -> None:
    """Sets the words that ``count`` and ``scan`` have used back to 0; ``scan`` writes whole blocks of bins."""
    first, last = max(lowest - _BLOCK_BINS, 0), min(highest + _BLOCK_BINS, BINS)
    table[first:last] = 0
    table[BINS + first : BINS + last] = 0
    table[_UNCOUNTED:] = 0


@compiled
def look_up(
    errors: npt.NDArray[np.float32],
    codes: Codes,
    row: int,
    foreground: int,
    void: int,
    ignored: int,
    cut: bool,
    top: int,
    table: Integers,
    planes: Planes,
    first_plane: int,
    stop_plane: int,
    start: int,
    stop: int,
    last: int,
    add: bool,
) -> None:
    """Writes (or adds, if ``add``) the gradient of the row's pixels [start, stop), which lie in the given planes."""
    entries = table.view(np.float32)
    entries[2 * _UNCOUNTED : 2 * _UNCOUNTED + 2] = f32(0)
    top_bits, foreground_code, void_code, ignored_code = _top_bits(top), i32(foreground), i32(void), i32(ignored)
    nothing = top_bits if cut else i32(-1)  # the distance of an error of 0
    last_counted, counted, is_sparse = i32(last), np.empty(_BLOCK_PIXELS // _PART_PIXELS, np.bool_), True
    places, rests = np.empty(_BLOCK_PIXELS, np.int32), np.empty(_BLOCK_PIXELS, np.int32)
    for plane in range(first_plane, stop_plane):
        plane_start = planes.start[plane]
        low, high = max(start, plane_start), min(stop, plane_start + planes.pixels[plane])
        if low >= high:
            continue
        address = planes.grads[plane] + np.uint64(4 * planes.pixels[plane] * row)
        grads = numba.carray(pointer(address), (planes.pixels[plane],), np.float32)
        for begin in range(low, high, _BLOCK_PIXELS):
            end = min(begin + _BLOCK_PIXELS, high)
            if is_sparse or (begin - low) % _DENSE_PIXELS == 0:
                error, code = errors[row, begin:end], codes[begin:end]
                is_sparse = _is_sparse(error, code, foreground_code, top_bits, last_counted, counted)
            step = _PART_PIXELS if is_sparse else _BLOCK_PIXELS
            for first in range(begin, end, step):
                n = min(step, end - first)
                error, code = errors[row, first : first + n], codes[first : first + n]
                place, rest, grad = places[:n], rests[:n], grads[first - plane_start : first - plane_start + n]
                if is_sparse and not counted[(first - begin) // _PART_PIXELS]:
                    for i in range(0 if add else n):  # As a loop, since NumPy's assignment is not vector code here.
                        grad[i] = f32(0)
                    continue
                for i in range(n):
                    distance = _distance(error[i], top_bits)
                    found, own = _bin(distance), i32(code[i])
                    is_left_out = (distance == nothing) | (distance > last_counted)
                    found = i32(found + (i32(BINS) if own == foreground_code else i32(0)))
                    found = i32(_UNCOUNTED) if own == void_code else found
                    found = i32(_UNCOUNTED) if own == ignored_code else found
                    place[i] = i32(_UNCOUNTED) if is_left_out else found
                    rest[i] = _rest(distance)
                if add:
                    for i in range(n):
                        at = 2 * np.uint32(place[i])
                        grad[i] += fma(-entries[at + 1], f32(rest[i]), entries[at])
                else:
                    for i in range(n):
                        at = 2 * np.uint32(place[i])
                        grad[i] = fma(-entries[at + 1], f32(rest[i]), entries[at])
