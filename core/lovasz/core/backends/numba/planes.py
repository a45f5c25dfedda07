"""The planes of a batch for compiled code, and functions that read logits and labels from them."""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from lovasz.core.backends.numba.intrinsics import (
    LANES,
    atomic_add,
    bits_float,
    compiled,
    float_bits,
    pointer,
    transpose,
)

FLOAT32, FLOAT16, BFLOAT16 = range(3)
UINT8, INT8, INT16, INT32, INT64 = range(5)
FLOAT_BYTES = (4, 2, 2)
LABEL_BYTES = (1, 1, 2, 4, 8)
"""The size of an element, by its kind."""

POINTS = 64
"""Points that are transposed at a time: with up to 64 classes they stay in the first-level cache."""

Addresses = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8] | npt.NDArray[np.int32]


class Planes(NamedTuple):
    """The planes of a batch (:mod:`lovasz.core.plan`), one element per plane.

    Attributes:
        logits: the address of the plane's logits, K rows of ``pixels`` elements.
        labels: the address of its labels.
        label_kind: the element type of its labels, UINT8 to INT64.
        grads: the address of its gradient, float32, K rows; undefined if no gradient is wanted.
        start: its first pixel in rows of scratch, which hold the pixels of all planes.
        pixels: the number of its pixels.
        joint: its joint.
        are_points: whether it is a point cloud: its logits are ``pixels`` rows of K float32.
        points: of a point cloud: the address of its gradient in the order of its logits, to which ``softmax.finish``
            copies ``grads``.
    """

    logits: Addresses
    labels: Addresses
    label_kind: Integers
    grads: Addresses
    start: Integers
    pixels: Integers
    joint: Integers
    are_points: npt.NDArray[np.bool_]
    points: Addresses


class Blocks(NamedTuple):
    """Tasks of a loop, one element per task: the pixels [first, last) of one plane."""

    plane: Integers
    first: Integers
    last: Integers


class Labelling(NamedTuple):
    """How labels become codes. A pixel's code is its label, or ``void`` if all terms ignore it or the label is bad.

    Attributes:
        values: labels are in [0, values).
        void: the code of pixels that are void for all terms.
        ignored: the label that all terms ignore; only if ``any_ignored``.
    """

    values: int
    void: int
    ignored: int
    any_ignored: bool


@compiled
def widen(kind: int, address: np.uint64, first: int, out: Floats) -> None:
    """Reads ``len(out)`` elements from the element ``first`` on, as float32."""
    n = len(out)
    if kind == FLOAT32:
        floats = numba.carray(pointer(address), (first + n,), np.float32)[first:]
        for i in range(n):
            out[i] = floats[i]
    elif kind == BFLOAT16:
        words = numba.carray(pointer(address), (first + n,), np.uint16)[first:]
        for i in range(n):
            out[i] = bits_float(np.int32(words[i]) << np.int32(16))
    else:
        words = numba.carray(pointer(address), (first + n,), np.uint16)[first:]
        for i in range(n):
            word = np.int32(words[i])
            sign = (word & np.int32(0x8000)) << np.int32(16)
            bits = (word & np.int32(0x7FFF)) << np.int32(13)
            value = bits_float(bits) * np.float32(2.0**112)  # The exponent biases differ by 112; exact.
            if bits >= np.int32(0x7C00 << 13):
                value = bits_float(bits | np.int32(0x7F800000))
            out[i] = bits_float(float_bits(value) | sign)


@compiled
def read_points(address: np.uint64, first: int, out: npt.NDArray[np.float32], start: int, n: int) -> None:
    """Reads n points (float32, K elements each) from the point ``first`` on into columns ``start`` and following."""
    channels, pitch = out.shape
    points = numba.carray(pointer(address), ((first + n) * channels,), np.float32)
    _transpose(points, first * channels, channels, n, channels, out.reshape(-1), start, pitch)


@compiled
def write_points(address: np.uint64, first: int, rows: npt.NDArray[np.float32], n: int) -> None:
    """The opposite of ``read_points``: writes the columns ``first`` and following of ``rows``."""
    channels, pitch = rows.shape
    points = numba.carray(pointer(address), ((first + n) * channels,), np.float32)
    _transpose(rows.reshape(-1), first, pitch, channels, n, points, first * channels, channels)


@compiled
def _transpose(
    source: Floats, place: int, pitch: int, rows: int, columns: int, out: Floats, out_place: int, out_pitch: int
) -> None:
    """Writes a matrix, whose row i begins at ``source[place + i * pitch]``, to ``out`` so that rows become columns."""
    if rows < LANES or columns < LANES:
        for row in range(rows):
            for column in range(columns):
                out[out_place + column * out_pitch + row] = source[place + row * pitch + column]
        return
    for first_row in range(0, rows, POINTS):
        for first_column in range(0, columns, POINTS):
            # The last square of a line overlaps the one before if the line's length is no multiple of LANES.
            for begin in range(first_row, min(first_row + POINTS, rows), LANES):
                row = min(begin, rows - LANES)
                for left in range(first_column, min(first_column + POINTS, columns), LANES):
                    column = min(left, columns - LANES)
                    transpose(
                        source,
                        place + row * pitch + column,
                        pitch,
                        out,
                        out_place + column * out_pitch + row,
                        out_pitch,
                    )


@compiled
def read_codes(kind: int, address: np.uint64, first: int, labelling: Labelling, out: Codes) -> int:
    """Turns labels into codes; returns how many are bad: neither in range nor ignored by all terms."""
    n, bad = len(out), 0
    if kind == UINT8:
        bytes_ = numba.carray(pointer(address), (first + n,), np.uint8)[first:]
        for i in range(n):
            bad += _encode(np.int64(bytes_[i]), labelling, out, i)
    elif kind == INT8:
        chars = numba.carray(pointer(address), (first + n,), np.int8)[first:]
        for i in range(n):
            bad += _encode(np.int64(chars[i]), labelling, out, i)
    elif kind == INT16:
        shorts = numba.carray(pointer(address), (first + n,), np.int16)[first:]
        for i in range(n):
            bad += _encode(np.int64(shorts[i]), labelling, out, i)
    elif kind == INT32:
        ints = numba.carray(pointer(address), (first + n,), np.int32)[first:]
        for i in range(n):
            bad += _encode(np.int64(ints[i]), labelling, out, i)
    else:
        longs = numba.carray(pointer(address), (first + n,), np.int64)[first:]
        for i in range(n):
            bad += _encode(longs[i], labelling, out, i)
    return bad


@compiled
def _encode(label: int, labelling: Labelling, out: Codes, i: int) -> int:
    in_range = 0 <= label < labelling.values
    ignored = labelling.any_ignored and label == labelling.ignored
    out[i] = label if in_range and not ignored else labelling.void
    return 0 if in_range or ignored else 1


@compiled
def claim(tasks: Integers, count: int) -> int:
    """The next task for this thread; a number of at least ``count`` if no task is left."""
    return int(atomic_add(tasks, 0, 1))
