"""From the counts of a table to the entries in which pixels look up their gradient, and to the loss.

Many bins of a table are empty. A walk over a block of bins lists those in use; the arithmetic is vector code over this
list. docs/mathematics.md, section 11, derives the entries.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numpy import float32 as f32

from lovasz.core.backends.numba import bins
from lovasz.core.backends.numba.elementary import ordered_sum
from lovasz.core.backends.numba.intrinsics import bits_double, compiled, float_bits, inlined
from lovasz.core.backends.numba.planes import Integers
from lovasz.core.word import REST_BITS, REST_SUM_BITS

Doubles = npt.NDArray[np.float64]

BINS, _FIRST_BINS = bins.BINS, bins.FIRST_BINS
_MAX_BITS, _MIN_BITS, _PER_BIT, _OCTAVES = bins.MAX_BITS, bins.MIN_BITS, bins.OCTAVES_PER_BIT, bins.OCTAVES
_REST_BITS, _REST_SUM_BITS = REST_BITS, REST_SUM_BITS
_REST_SUM_MASK = np.int64((1 << REST_SUM_BITS) - 1)
_RESTS = float(1 << REST_BITS)
_TO_SLOPE = 1.0 / _RESTS
_BLOCK_BINS = 256
_UNEVEN = 0.3
_BLOCKS = BINS // _BLOCK_BINS + bins.SPANS
"""At least as many blocks as a table has: none has bins of two octaves."""


class Block(NamedTuple):
    """The bins in use of a block, in their order, and what is worked out of them: one element per bin, and one more.

    Attributes:
        is_used: uint8, one per bin of the block.
        place: uint32: the bin, counted from the first one of the block.
        foreground_bins: uint32: those of the bins in use that have foreground, counted among the bins in use.
        word: int64: the words of background.
        left, union: int64: G - n and G + b at the upper end of each bin; the last element, at the lower end of all.
        over_union: float64: 1 / ``union``.
        mean, slope: float64: of g of background; g falls by ``slope`` per unit of the rest, or by less (``_entries``).
        loss: float64: the parts of the loss.
        entry: int64: the entries.
    """

    is_used: npt.NDArray[np.uint8]
    place: npt.NDArray[np.uint32]
    foreground_bins: npt.NDArray[np.uint32]
    word: Integers
    left: Integers
    union: Integers
    over_union: Doubles
    mean: Doubles
    slope: Doubles
    loss: Doubles
    entry: Integers


@compiled
def scan(
    table: Integers,
    lowest: int,
    highest: int,
    left: int,
    union: int,
    top: int,
    weight: float,
    foreground_weight: float,
) -> float:
    """Overwrites each word in use with an entry, two float32 (a, s): a pixel's gradient is a - s x rest.

    Args:
        table: ``tables.WORDS`` words, as ``tables.count`` has filled them.
        lowest, highest: the lowest and the highest bin in use. Other bins may be in use if no block has bins of both.
        left, union: G - n and G + b at the upper end of the lowest bin: G, unless the table lacks pixels before.
        top: the exponent of the first octave.
        weight, foreground_weight: the factors of the gradient of background and foreground.

    Returns:
        The loss: the sum over bins of mean g x sum of errors.
    """
    loss, block = 0.0, _block()
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
            background, foreground = table[first:last], table[BINS + first : BINS + last]
            n, m, left, union = _walk(background, foreground, left, union, block)
            if n > 0:
                upper = largest - (first - start) * width - lost
                _over_union(block.union, n + 1, block.over_union)
                loss += _fill_in(background, block, n, upper, width, weight)
                loss += _fill_in_foreground(foreground, block, m, upper, width, foreground_weight)
    return loss


class Window(NamedTuple):
    """Consecutive pixels of a segment in the order of errors: those in the bins [first, stop).

    Attributes:
        before, foreground_before: the number of pixels before them, and how many of these are foreground.
        pixels, foreground: the number of its pixels, and how many of them are foreground.
        is_enough: whether the error is as small as asked if its pixels are sorted.
    """

    first: int
    stop: int
    before: int
    foreground_before: int
    pixels: int
    foreground: int
    is_enough: bool


@compiled
def window(
    table: Integers,
    lowest: int,
    highest: int,
    foreground_count: int,
    top: int,
    is_bounded: bool,
    is_weighed: bool,
    most_error: float,
    few: int,
    most: int,
) -> Window:
    """The pixels of a segment that have to be sorted, since the order inside bins matters most there.

    Args:
        table, lowest, highest, foreground_count, top: as for ``scan``; the table has been counted, but not scanned.
        is_bounded: whether errors are probabilities.
        is_weighed: whether the gradient is taken back through softmax or sigmoid, which weighs an error e by e (1 - e).
        most_error: all other pixels cause at most this error of the gradient, relative to its norm. It is estimated as
            if the pixels of each bin were in random order. If k of them are background and j foreground, the number of
            background pixels before another one is uncertain by sqrt(k / 6); before foreground, whose mean place among
            them is not known either, by sqrt(k / 6 + k^2 / (12 j)). The same holds for the number of foreground pixels.
        few: if no more pixels come before the last foreground, they are the window.
        most: the most pixels otherwise, which may be too few for ``most_error``.
    """
    highest = _last_bin(table, lowest, highest, foreground_count)
    block, n, norm, pixels = _block(), 0, 0.0, 0
    starts, stops = np.empty(_BLOCKS, np.int64), np.empty(_BLOCKS, np.int64)
    counts, foreground, error = np.empty(_BLOCKS, np.int64), np.empty(_BLOCKS, np.int64), np.empty(_BLOCKS)
    left, union = np.int64(foreground_count), np.int64(foreground_count)
    for octave in range(bins.SPANS):
        largest, width, _ = _scale(octave, top)
        start, stop = _FIRST_BINS[octave], min(highest + 1, _FIRST_BINS[octave + 1])
        skipped = max(lowest - start, 0) // _BLOCK_BINS * _BLOCK_BINS
        for first in range(start + skipped, stop, _BLOCK_BINS):
            last, left_before, union_before = min(first + _BLOCK_BINS, stop), left, union
            used, _, left, union = _walk(table[first:last], table[BINS + first : BINS + last], left, union, block)
            if used == 0:
                continue
            _over_union(block.union, used + 1, block.over_union)
            errors, norms = block.mean, block.slope
            _uncertainty(block.word, block.left, block.over_union, used, errors, norms)
            upper = largest - (first - start) * width
            if is_bounded:
                _add_bias(block.word, block.place, used, upper, width, errors)
            if is_weighed:
                _weigh(block.place, used, upper, width, errors, norms)
            starts[n], stops[n], foreground[n] = first, last, left_before - left
            error[n], norm = ordered_sum(errors[:used]), norm + ordered_sum(norms[:used])
            counts[n] = foreground[n] + union - union_before
            pixels, n = pixels + counts[n], n + 1
    begin, end, dropped, most_dropped = 0, n, 0.0, 3.0 * most_error * most_error * norm
    are_few = pixels <= few
    while begin < end and not are_few:
        # Drops the first or the last block, whichever has less error per pixel, as long as that adds up to little.
        is_first = error[begin] * counts[end - 1] <= error[end - 1] * counts[begin]
        outer = begin if is_first else end - 1
        if dropped + error[outer] > most_dropped and pixels <= most:
            break
        dropped, pixels = dropped + error[outer], pixels - counts[outer]
        begin, end = (begin + 1, end) if is_first else (begin, end - 1)
    is_enough = dropped <= most_dropped
    if begin == end:
        return Window(lowest, lowest, 0, 0, 0, 0, is_enough)
    first, stop, own_foreground = starts[begin], stops[end - 1], foreground[begin:end].sum()
    return Window(first, stop, counts[:begin].sum(), foreground[:begin].sum(), pixels, own_foreground, is_enough)


@compiled
def _last_bin(table: Integers, lowest: int, highest: int, foreground_count: int) -> int:
    """The last bin with foreground; ``highest`` if the table lacks foreground: that comes after all its pixels."""
    foreground = table[BINS + lowest : BINS + highest + 1]
    counted = np.uint64(0)
    for i in range(len(foreground)):
        counted += np.uint64(foreground[i]) >> np.uint64(_REST_SUM_BITS)
    while np.int64(counted) == foreground_count and highest >= lowest and table[BINS + highest] == 0:
        highest -= 1
    return highest


@compiled
def _weigh(place: npt.NDArray[np.uint32], n: int, upper: float, width: float, error: Doubles, norm: Doubles) -> None:
    """Weighs what ``_uncertainty`` writes by e (1 - e), squared, at that end of the bin that makes the error larger.

    Args:
        upper: the upper end of the first bin of the block.
    """
    for i in range(n):
        above = upper - np.float64(np.int32(place[i])) * width
        below = above - width
        at_upper, at_lower = max(above * (1.0 - above), 0.0), max(below * (1.0 - below), 0.0)
        most, least = max(at_upper, at_lower), min(at_upper, at_lower)
        error[i] *= most * most
        norm[i] *= least * least


@compiled
def _add_bias(
    word: Integers, place: npt.NDArray[np.uint32], n: int, upper: float, width: float, error: Doubles
) -> None:
    """Adds what it costs that the pixels of bins close to 1 are not spread evenly: there are more in their upper parts.

    In a bin [1 - w, 1), where w is its width, g is taken to be off by ``_UNEVEN`` of its change over the bin; in others
    by less, as w / (1 - e) says. For k background pixels, the error is so much larger than that of a random order.

    Args:
        upper: as for ``_weigh``.
    """
    for i in range(n):
        k, _ = _unpack(word[i])
        below = upper - (np.float64(np.int32(place[i])) + 1.0) * width
        share = _UNEVEN * min(width / max(1.0 - below, width), 1.0)
        error[i] *= 1.0 + 6.0 * k * share * share


@compiled
def _block() -> Block:
    """Memory."""
    n = _BLOCK_BINS + 1
    is_used, place, foreground_bins = np.empty(n, np.uint8), np.empty(n, np.uint32), np.empty(n, np.uint32)
    word, left = np.empty(n, np.int64), np.empty(n, np.int64)
    union, entry = np.empty(n, np.int64), np.empty(n, np.int64)
    over_union, mean, slope, loss = np.empty(n), np.empty(n), np.empty(n), np.empty(n)
    return Block(is_used, place, foreground_bins, word, left, union, over_union, mean, slope, loss, entry)


@compiled
def _walk(background: Integers, foreground: Integers, left: int, union: int, block: Block) -> tuple[int, int, int, int]:
    """Lists the bins in use of a block.

    Args:
        background, foreground: the words of its bins.
        left, union: G - n and G + b at its upper end.

    Returns:
        How many bins are in use, how many of these have foreground, and ``left`` and ``union`` at its lower end.
    """
    is_used, place, foreground_bins = block.is_used, block.place, block.foreground_bins
    word, lefts, unions = block.word, block.left, block.union
    for i in range(len(background)):
        is_used[i] = np.uint8(1) if (background[i] | foreground[i]) != 0 else np.uint8(0)
    n = m = np.uint32(0)
    for i in range(len(background)):  # Without branches: the next bin overwrites one that is empty.
        place[n] = np.uint32(i)
        n = np.uint32(n + np.uint32(is_used[i]))
    for c in range(n):
        back, front = background[place[c]], foreground[place[c]]
        word[c], lefts[c], unions[c], foreground_bins[m] = back, left, union, np.uint32(c)
        m = np.uint32(m + (np.uint32(1) if front != 0 else np.uint32(0)))
        left -= np.int64(np.uint64(front) >> np.uint64(_REST_SUM_BITS))
        union += np.int64(np.uint64(back) >> np.uint64(_REST_SUM_BITS))
    lefts[n], unions[n] = left, union
    return np.int64(n), np.int64(m), left, union


# Each loop uses few arrays: with more, the compiler cannot prove that they do not overlap. They are passed whole, with
# the number of elements, since to make a slice takes as long as a few bins.


@compiled
def _over_union(union: Integers, n: int, over_union: Doubles) -> None:
    for i in range(n):
        over_union[i] = 1.0 / _double(union[i])


@compiled
def _fill_in(background: Integers, block: Block, n: int, upper: float, width: float, weight: float) -> float:
    """Writes the entries of background in the bins in use; returns their part of the loss.

    Args:
        background: the words of the block.
        n: the number of bins in use.
        upper: the error at rest 0 in the first bin of the block.
        width: the width of a bin.
    """
    mean, slope, loss, entry = block.mean, block.slope, block.loss, block.entry
    _means(block.left, block.over_union, n, mean, slope)
    _entries(block.word, mean, slope, n, weight, entry)
    _losses(block.word, mean, block.place, n, upper, width, loss)
    for c in range(n):
        background[block.place[c]] = entry[c]
    return ordered_sum(loss[:n])


@compiled
def _means(left: Integers, over_union: Doubles, n: int, mean: Doubles, slope: Doubles) -> None:
    """Writes the mean of g of background in each bin, and by how much g falls per unit of the rest."""
    for i in range(n):
        x, y = over_union[i], over_union[i + 1]
        here, behind = _double(left[i]), _double(left[i + 1])
        middle = 0.5 * (here + behind) * x * y
        mean[i] = middle
        slope[i] = (here * x * x - behind * y * y) * _TO_SLOPE


@compiled
def _entries(word: Integers, mean: Doubles, slope: Doubles, n: int, weight: float, entry: Integers) -> None:
    for i in range(n):
        k, rest = _unpack(word[i])
        mean_rest = f32(rest) / f32(max(k, 1.0))
        falling = min(slope[i], np.float64(f32(mean[i]) / (f32(_RESTS) - mean_rest)))  # So that no g is negative.
        entry[i] = _pack(weight * (mean[i] + falling * np.float64(mean_rest)), weight * falling)


@compiled
def _losses(
    word: Integers, mean: Doubles, place: npt.NDArray[np.uint32], n: int, upper: float, width: float, loss: Doubles
) -> None:
    unit = width / (1 << _REST_BITS)
    for i in range(n):
        k, rest = _unpack(word[i])
        loss[i] = mean[i] * (k * (upper - np.float64(np.int32(place[i])) * width) - rest * unit)


@compiled
def _fill_in_foreground(foreground: Integers, block: Block, m: int, upper: float, width: float, weight: float) -> float:
    """The same as ``_fill_in`` for foreground, which ``m`` bins have."""
    over_union, loss, unit = block.over_union, block.loss, width / (1 << _REST_BITS)
    for c in range(m):
        bin_in_use = block.foreground_bins[c]
        place = block.place[bin_in_use]
        x, y = over_union[bin_in_use], over_union[bin_in_use + np.uint32(1)]
        j, rest = _unpack(foreground[place])
        mean = 0.5 * (x + y)
        slope = min((x - y) * _TO_SLOPE, mean * j / (_RESTS * j - rest))
        loss[c] = mean * (j * (upper - np.float64(place) * width) - rest * unit)
        foreground[place] = _pack(weight * (mean + slope * (rest / j)), weight * slope)
    return ordered_sum(loss[:m])


@compiled
def _uncertainty(word: Integers, left: Integers, over_union: Doubles, n: int, error: Doubles, norm: Doubles) -> None:
    """Writes the terms of both sums of the estimate in ``window``: sqrt(sum of errors / (3 x sum of norms))."""
    for i in range(n):
        x, y = over_union[i], over_union[i + 1]
        here, behind = _double(left[i]), _double(left[i + 1])
        k, _ = _unpack(word[i])
        j, mean_left = here - behind, 0.5 * (here + behind)
        steep = k * mean_left * x
        unknown_mean = 0.25 * (j * j + k * k) if j * k > 0.0 else 0.0
        error[i] = (x * x) * (x * x) * (j * k + 2.0 * (steep * steep) + unknown_mean)
        norm[i] = x * y * (j + steep * mean_left * y)


@inlined
def _double(integer: np.int64) -> float:
    """An integer in [0, 2^52) as float64; the processor's own conversion does not vectorize."""
    return bits_double(integer | np.int64(0x4330000000000000)) - 4503599627370496.0


@inlined
def _unpack(word: int) -> tuple[float, float]:
    """The two parts of a word: (pixels, sum of their rests)."""
    return _double(np.int64(np.uint64(word) >> np.uint64(_REST_SUM_BITS))), _double(word & _REST_SUM_MASK)


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
