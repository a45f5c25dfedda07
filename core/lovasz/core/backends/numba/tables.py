"""The Lovász extension by counting: errors are counted in bins, and each pixel's gradient is looked up in its bin.

``bins`` defines the bins; between the two, ``scanning`` turns the counts into what is looked up.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numpy import float32 as f32
from numpy import int32 as i32
from numpy import uint32 as u32

from lovasz.core.backends.numba import bins
from lovasz.core.backends.numba.intrinsics import compiled, float_bits, fma, inlined
from lovasz.core.backends.numba.planes import Codes, Floats, Integers
from lovasz.core.word import REST_BITS, REST_SUM_BITS

BINS = bins.BINS
_UNCOUNTED = 2 * BINS
_UNCOUNTED_WORDS = 16
"""Pixels without a bin share so many words. One for all would be slow: each addition would wait for the one before."""
_POSITION_BITS = 31
WORDS = 1 << (_POSITION_BITS - REST_BITS)
"""The words of a table: one per bin for background, then for foreground, then those for pixels without a bin. The rest
are not used: any position, also one that was not computed, has a word in the table."""
_MAX_BITS, _MIN_BITS, _PER_BIT = bins.MAX_BITS, bins.MIN_BITS, bins.OCTAVES_PER_BIT
_OCTAVES, _REST_BITS, _REST_MASK = bins.OCTAVES, REST_BITS, (1 << REST_BITS) - 1
_FINER_BITS = _MAX_BITS + REST_BITS - 23
_ALL_BEFORE = _PER_BIT << (_MAX_BITS + 1 + REST_BITS)
"""The end of the positions of octaves with more than ``MIN_BITS``, if the bins became fewer without an end."""
assert _PER_BIT == 3, "_coarser divides by 3"
assert _FINER_BITS >= 0, "_position shifts to the left"
assert (_OCTAVES - _PER_BIT * (_MAX_BITS - _MIN_BITS)) << (_MAX_BITS + REST_BITS) < 1 << 32, "that has 32 bits"
assert _UNCOUNTED + _UNCOUNTED_WORDS <= WORDS
_ONE = np.int64(1 << REST_SUM_BITS)

_BLOCK_PIXELS, _PART_PIXELS = 1024, 128
_DENSE_PIXELS = 8 * _BLOCK_PIXELS
"""Pixels are processed in blocks. Of a block most of whose parts have nothing to count, only the other parts are
processed. After a dense block, the next one that is looked at for this begins at a multiple of ``_DENSE_PIXELS``."""


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
def _position(distance: i32) -> i32:
    """Where a distance falls: its bin x 2^REST_BITS + its rest."""
    near = min(distance, i32(_OCTAVES << 23))
    coarser = _coarser(i32(near >> i32(23)))
    # The octaves whose bins have so few bits begin at a multiple of _PER_BIT octaves; 3 x 2^MAX_BITS bins, half as many
    # again and so on are before them.
    within = u32(i32(near - i32(coarser * i32(_PER_BIT << 23))) << i32(_FINER_BITS)) >> u32(coarser)
    return i32(i32(i32(_ALL_BEFORE) - i32(i32(_ALL_BEFORE) >> coarser)) + i32(within))


ALL_DISTANCES = (1 << 31) - 1


@compiled
def floor(stop: int, top: int) -> int:
    """The bits above which errors are in bins before ``stop``."""
    nearest, furthest = 0, ALL_DISTANCES  # The smallest distance that is in no such bin is between them.
    while nearest < furthest:
        middle = (nearest + furthest) // 2
        if _position(i32(middle)) >> _REST_BITS < stop:
            nearest = middle + 1
        else:
            furthest = middle
    return int(_top_bits(top)) - nearest


@compiled
def floor_behind(last: int, top: int) -> int:
    """The bits above which errors have at most the distance ``last``."""
    return int(_top_bits(top)) - last - 1


@compiled
def last_distance(smallest: int, top: int) -> int:
    """The largest distance in the bin of the smallest foreground error: background further away has g = 0.

    Args:
        smallest: the bits of this error.
    """
    most = max(i32(_top_bits(top) - i32(smallest)), i32(0))
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


class Pixels(NamedTuple):
    """Pixels of a segment, and what decides their positions.

    Attributes:
        errors, codes: one element per pixel.
        foreground: the code of the class.
        void: the code of pixels that are void for all terms.
        ignored: the code of further pixels that are void for this term; ``void`` if there are none.
        cut: whether a pixel with error 0 gets gradient 0, as for the hinge.
        top: the exponent of the first octave.
        last: pixels at larger distances are left out; the result of ``last_distance``, or ``ALL_DISTANCES``.
    """

    errors: Floats
    codes: Codes
    foreground: int
    void: int
    ignored: int
    cut: bool
    top: int
    last: int


@compiled
def count(pixels: Pixels, table: Integers, kept: npt.NDArray[np.int32]) -> tuple[int, int]:
    """Counts pixels in a segment's table: background in the first BINS words, foreground in the next BINS words.

    With ``cut``, pixels with error 0 are left out: they come last, and add nothing to the loss.

    Args:
        table: ``WORDS`` words.
        kept: shape (pixels,), written: the position of each pixel, for ``look_up``; shape (0,) if it is not wanted.

    Returns:
        (lowest, highest) bin that any pixel falls in.
    """
    errors, codes, foreground, void, ignored, cut, top, last = pixels
    positions, not_kept = np.empty(_BLOCK_PIXELS, np.int32), np.empty(_BLOCK_PIXELS, np.int32)
    lowest, highest = i32(BINS << _REST_BITS), i32(-1)
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
            n = min(step, end - first)
            error, code = errors[first : first + n], codes[first : first + n]
            position, own_kept = positions[:n], kept[first : first + n] if len(kept) > 0 else not_kept[:n]
            if is_sparse and not counted[(first - begin) // _PART_PIXELS]:
                for i in range(n if len(kept) > 0 else 0):
                    own_kept[i] = i32(_UNCOUNTED << _REST_BITS)
                continue
            for i in range(n):
                distance, own = _distance(error[i], top_bits), i32(code[i])
                found, uncounted = _position(distance), i32(i32(_UNCOUNTED) + i32(i % _UNCOUNTED_WORDS))
                is_left_out = (distance == nothing) | (distance > last_counted)
                highest = max(highest, i32(-1) if is_left_out else found)
                lowest = min(lowest, found)
                found = i32(found + (i32(BINS << _REST_BITS) if own == foreground_code else i32(0)))
                is_left_out |= (own == void_code) | (own == ignored_code)
                # ``kept`` may be memory that another process changes: what is counted is read from ``position``.
                position[i] = own_kept[i] = i32(uncounted << i32(_REST_BITS)) if is_left_out else found
            for i in range(n):
                own_bin, rest = u32(position[i]) >> u32(_REST_BITS), position[i] & i32(_REST_MASK)
                table[own_bin] += _ONE + np.int64(rest)
    return np.int64(lowest >> i32(_REST_BITS)), np.int64(highest >> i32(_REST_BITS))


@compiled
def clear(table: Integers, lowest: int, highest: int) -> None:
    """Sets the words of the bins [lowest, highest], and those that pixels without a bin share, back to 0."""
    table[lowest : highest + 1] = 0
    table[BINS + lowest : BINS + highest + 1] = 0
    table[_UNCOUNTED : _UNCOUNTED + _UNCOUNTED_WORDS] = 0


@compiled
def look_up(kept: npt.NDArray[np.int32], table: Integers, grads: Floats) -> None:
    """Writes the gradient of pixels.

    Args:
        kept: as ``count`` has written it; it may be the memory of ``grads``. Any other contents are harmless, too.
    """
    entries = table.view(np.float32)
    entries[2 * _UNCOUNTED : 2 * (_UNCOUNTED + _UNCOUNTED_WORDS)] = f32(0)
    for i in range(len(kept)):
        grads[i] = _entry(entries, i32(kept[i] & i32((1 << _POSITION_BITS) - 1)))


@compiled
def look_up_again(pixels: Pixels, table: Integers, add: bool, grads: Floats) -> None:
    """The same, with positions that are worked out once more.

    Args:
        add: whether the gradient is added to ``grads``, which may be the memory of the errors otherwise.
    """
    errors, codes, foreground, void, ignored, cut, top, last = pixels
    entries = table.view(np.float32)
    entries[2 * _UNCOUNTED : 2 * _UNCOUNTED + 2] = f32(0)
    top_bits, foreground_code, void_code, ignored_code = _top_bits(top), i32(foreground), i32(void), i32(ignored)
    nothing = top_bits if cut else i32(-1)  # the distance of an error of 0
    last_counted, counted, is_sparse = i32(last), np.empty(_BLOCK_PIXELS // _PART_PIXELS, np.bool_), True
    positions = np.empty(_BLOCK_PIXELS, np.int32)
    for begin in range(0, len(errors), _BLOCK_PIXELS):
        end = min(begin + _BLOCK_PIXELS, len(errors))
        if is_sparse or begin % _DENSE_PIXELS == 0:
            error, code = errors[begin:end], codes[begin:end]
            is_sparse = _is_sparse(error, code, foreground_code, top_bits, last_counted, counted)
        step = _PART_PIXELS if is_sparse else _BLOCK_PIXELS
        for first in range(begin, end, step):
            n = min(step, end - first)
            error, code = errors[first : first + n], codes[first : first + n]
            position, grad = positions[:n], grads[first : first + n]
            if is_sparse and not counted[(first - begin) // _PART_PIXELS]:
                for i in range(0 if add else n):  # As a loop, since NumPy's assignment is not vector code here.
                    grad[i] = f32(0)
                continue
            for i in range(n):
                distance, own = _distance(error[i], top_bits), i32(code[i])
                is_left_out = (distance == nothing) | (distance > last_counted)
                is_left_out |= (own == void_code) | (own == ignored_code)
                found = i32(_position(distance) + (i32(BINS << _REST_BITS) if own == foreground_code else i32(0)))
                position[i] = i32(_UNCOUNTED << _REST_BITS) if is_left_out else found
            if add:
                for i in range(n):
                    grad[i] += _entry(entries, position[i])
            else:
                for i in range(n):
                    grad[i] = _entry(entries, position[i])


@inlined
def _entry(entries: Floats, position: i32) -> f32:
    """The gradient at a position."""
    at = 2 * (u32(position) >> u32(_REST_BITS))
    return fma(-entries[at + 1], f32(position & i32(_REST_MASK)), entries[at])
