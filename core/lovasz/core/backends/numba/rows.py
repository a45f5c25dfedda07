"""Loops over the rows of a block of pixels, one row for each class: maxima, sums, and each pixel's value in one row.

A block is ``len(out)`` columns, from ``start`` on. Several rows are read at a time where a result of each pixel grows
with them: it is read and written less often. Each loop over pixels uses few arrays: with more, the compiler cannot
prove that they do not overlap.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numpy import float32 as f32
from numpy import int32 as i32

from lovasz.core.backends.numba.intrinsics import compiled, float_bits, inlined
from lovasz.core.backends.numba.planes import Codes, Floats

Rows = npt.NDArray[np.float32]


@compiled
def find_largest(rows: Rows, start: int, out: Floats, place: npt.NDArray[np.int32]) -> bool:
    """Writes the largest value of each pixel and its row, the first one that has it; returns whether all are finite."""
    n, last, bits = len(out), len(rows) - 1, i32(0)
    out[:] = f32(-np.inf)
    place[:] = 0
    for k in range(0, len(rows), 4):
        second, third, fourth = min(k + 1, last), min(k + 2, last), min(k + 3, last)
        a, b = rows[k, start : start + n], rows[second, start : start + n]
        c, d = rows[third, start : start + n], rows[fourth, start : start + n]
        for i in range(n):  # The last row once more changes nothing.
            largest, row = out[i], place[i]
            row = i32(k) if a[i] > largest else row
            largest = max(a[i], largest)
            row = i32(second) if b[i] > largest else row
            largest = max(b[i], largest)
            row = i32(third) if c[i] > largest else row
            largest = max(c[i], largest)
            place[i] = i32(fourth) if d[i] > largest else row
            out[i] = max(d[i], largest)
            bits = max(bits, max(max(_magnitude(a[i]), _magnitude(b[i])), max(_magnitude(c[i]), _magnitude(d[i]))))
    return bits < float_bits(f32(np.inf))


@inlined
def _magnitude(value: f32) -> i32:
    """The bits of the absolute value; those of NaN are larger than those of infinity."""
    return i32(float_bits(value) & i32(0x7FFFFFFF))


@compiled
def mark_infinite(rows: Rows, start: int, out: Floats) -> None:
    """Adds 1 for each value that is infinite or NaN, but not for -inf, the logit of a masked class."""
    n = len(out)
    for k in range(len(rows)):
        row = rows[k, start : start + n]
        for i in range(n):
            out[i] += f32(0) if row[i] < f32(np.inf) else f32(1)


@compiled
def add_rows(rows: Rows, start: int, out: Floats) -> None:
    """Writes each pixel's sum over the rows, in their order."""
    n, whole = len(out), len(rows) // 4 * 4
    out[:] = f32(0)
    for k in range(0, whole, 4):
        a, b = rows[k, start : start + n], rows[k + 1, start : start + n]
        c, d = rows[k + 2, start : start + n], rows[k + 3, start : start + n]
        for i in range(n):
            out[i] = (((out[i] + a[i]) + b[i]) + c[i]) + d[i]
    for k in range(whole, len(rows)):
        row = rows[k, start : start + n]
        for i in range(n):
            out[i] += row[i]


@compiled
def add_products(rows: Rows, start: int, factors: Rows, first: int, out: Floats) -> None:
    """The same of value x factor; the factors of the block are the columns ``first`` and following."""
    n, whole = len(out), len(rows) // 2 * 2
    out[:] = f32(0)
    for k in range(0, whole, 2):
        a, b = rows[k, start : start + n], rows[k + 1, start : start + n]
        of_a, of_b = factors[k, first : first + n], factors[k + 1, first : first + n]
        for i in range(n):
            out[i] = (out[i] + a[i] * of_a[i]) + b[i] * of_b[i]
    for k in range(whole, len(rows)):
        row, of_row = rows[k, start : start + n], factors[k, first : first + n]
        for i in range(n):
            out[i] += row[i] * of_row[i]


# Places are unsigned, and in one axis: Numba has no test for negative ones then.


@compiled
def gather(rows: Rows, start: int, code: Codes, out: Floats) -> None:
    """Copies each pixel's value from the row of its label; void pixels get an arbitrary value."""
    values, pitch, last = rows.reshape(-1), np.uint64(rows.shape[1]), np.uint64(len(rows) - 1)
    for i in range(len(code)):
        out[i] = values[min(np.uint64(code[i]), last) * pitch + np.uint64(start + i)]


@compiled
def take(rows: Rows, start: int, code: Codes, out: Floats) -> None:
    """The same as ``gather``, and sets these values to 0 in their rows."""
    values, pitch, last = rows.reshape(-1), np.uint64(rows.shape[1]), np.uint64(len(rows) - 1)
    for i in range(len(code)):
        place = min(np.uint64(code[i]), last) * pitch + np.uint64(start + i)
        out[i] = values[place]
        values[place] = f32(0)


@compiled
def put(values: Floats, code: Codes, void: int, rows: Rows, start: int) -> None:
    """Writes each pixel's value to the row of its label; those of void pixels are left out."""
    out, pitch, of_void = rows.reshape(-1), np.uint64(rows.shape[1]), i32(void)
    for i in range(len(code)):
        if i32(code[i]) != of_void:
            out[np.uint64(code[i]) * pitch + np.uint64(start + i)] = values[i]
