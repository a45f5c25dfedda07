"""Softmax: errors from logits, and the backward pass from gradients of errors to gradients of logits.

Both sweeps process the pixels in blocks that stay in cache, one class after the other. So the loops over pixels
vectorize, and the sums over classes are in the same order for every pixel.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from numpy import float32 as f32
from numpy import int32 as i32

from lovasz.core.backends.numba.cross_entropy import CrossEntropies, add_spread, pixel_losses, weighted_logits
from lovasz.core.backends.numba.elementary import exp
from lovasz.core.backends.numba.intrinsics import atomic_add, atomic_max, compiled, float_bits, pointer, prefetch
from lovasz.core.backends.numba.keys import MOST
from lovasz.core.backends.numba.planes import (
    FLOAT_BYTES,
    Blocks,
    Codes,
    Floats,
    Integers,
    Labelling,
    Planes,
    claim,
    read_codes,
    read_points,
    widen,
    write_points,
)
from lovasz.core.backends.numba.rows import add_products, add_rows, find_largest, gather, mark_infinite, put, take

READ_ELEMENTS, READ_PIXELS = 1 << 17, 4096
"""The most elements (classes x pixels), and pixels, of a block on the way there: half of a core's second-level cache.
Its rows are long, since the processor reads ahead only once it has read some of a row."""
WRITTEN_ELEMENTS, WRITTEN_PIXELS = 1 << 15, 512
"""The same on the way back, which asks for the rows of the next block in time; each block is read several times."""
_SMALLEST = 4
"""The smallest error of a class is kept so many times, of pixels in turn: neighbours do not wait for each other."""


class Counts(NamedTuple):
    """Numbers of pixels, int64, each array flat.

    Attributes:
        labels: (planes x K): pixels of each class.
        predictions: (planes x K): pixels predicted as each class.
        hits: (planes x K): pixels predicted as each class that belong to it.
        nearest: (planes x K): the largest ``MOST - bits`` of the errors of the class's own pixels; 0: it has none. Only
            ``prepare`` writes it.
        faults: (3 x joints): pixels with each :class:`~lovasz.core.computed.Fault`.
    """

    labels: Integers
    predictions: Integers
    hits: Integers
    nearest: Integers
    faults: Integers


@compiled
def block_pixels(channels: int, elements: int, most: int) -> int:
    """The pixels of a block."""
    return max(64, min(most, elements // channels // 64 * 64))


@compiled
def prepare(
    tasks: Integers,
    blocks: Blocks,
    planes: Planes,
    logits_kind: int,
    labelling: Labelling,
    errors: npt.NDArray[np.float32],
    codes: Codes,
    label_probability: Floats,
    entropies: CrossEntropies,
    counts: Counts,
) -> None:
    """Writes errors (K, pixels), codes and the probability of the label's class, and counts pixels.

    The error of a class is its probability p; for the label's class it is 1 - p, computed as the sum of the other
    classes' probabilities.
    """
    channels, joints = labelling.values, len(counts.faults) // 3
    size = block_pixels(channels, READ_ELEMENTS, READ_PIXELS)
    maximum, prediction, not_finite = np.empty(size, f32), np.empty(size, np.int32), np.empty(size, f32)
    total, others = np.empty(size, f32), np.empty(size, f32)
    label_exponential, label_shifted = np.empty(size, f32), np.empty(size, f32)
    local, smallest = np.empty((3, channels), np.int64), np.empty((_SMALLEST, channels + 1), f32)
    while True:
        task = claim(tasks, len(blocks.plane))
        if task >= len(blocks.plane):
            break
        plane = blocks.plane[task]
        joint = planes.joint[plane]
        local[:] = 0
        smallest[:] = f32(np.inf)
        for first in range(blocks.first[task], blocks.last[task], size):
            n = min(size, blocks.last[task] - first)
            start = planes.start[plane] + first
            code = codes[start : start + n]
            m, p, nf = maximum[:n], prediction[:n], not_finite[:n]
            t, o, ey, xy = total[:n], others[:n], label_exponential[:n], label_shifted[:n]
            bad = read_codes(planes.label_kind[plane], planes.labels[plane], first, labelling, code)
            is_finite = _read(planes, plane, logits_kind, first, errors, start, m, p, nf)
            for term in range(len(entropies.smoothing)):
                if entropies.smoothing[term] > f32(0):
                    weighted_logits(entropies, term, errors, start, m)
                    sums, counted = entropies.losses[term, start : start + n], entropies.counted[term]
                    for i in range(n):  # A masked class has a part of the target, and an infinite loss.
                        nf[i] += f32(0) if sums[i] > f32(-np.inf) else counted[code[i]]
            if not is_finite or len(entropies.smoothing) > 0:
                gather(errors, start, code, xy)
                for i in range(n):
                    xy[i] -= m[i]
                    nf[i] += f32(0) if xy[i] > f32(-np.inf) else f32(1)
            for k in range(channels):
                row = errors[k, start : start + n]
                for i in range(n):
                    row[i] = exp(row[i] - m[i])
            add_rows(errors, start, t)
            # Not others + label's: its last bit depends on the label, but equal logits must give equal errors.
            take(errors, start, code, ey)
            add_rows(errors, start, o)
            for term in range(len(entropies.smoothing)):
                losses = entropies.losses[term, start : start + n]
                pixel_losses(entropies, term, code, t, o, ey, xy, losses, joint, joints)
            y = label_probability[start : start + n]
            for i in range(n):
                t[i] = f32(1) / t[i]
            for i in range(n):
                y[i] = ey[i] * t[i]
            for k in range(channels):
                row = errors[k, start : start + n]
                for i in range(n):
                    row[i] *= t[i]
            for i in range(n):
                own, error = np.int64(code[i]), o[i] * t[i]
                errors[min(own, channels - 1), start + i] = error
                smallest[i % _SMALLEST, own] = min(smallest[i % _SMALLEST, own], error)
            infinite = _count(code, p, nf, labelling, local)
            atomic_add(counts.faults, joint, bad)
            atomic_add(counts.faults, joints + joint, infinite)
        _add_counts(counts, local, plane)
        for k in range(channels):
            if local[0, k] > 0:
                atomic_max(counts.nearest, plane * channels + k, np.int64(MOST - float_bits(smallest[:, k].min())))


@compiled
def _read(
    planes: Planes,
    plane: int,
    logits_kind: int,
    first: int,
    out: npt.NDArray[np.float32],
    start: int,
    maximum: Floats,
    prediction: npt.NDArray[np.int32],
    not_finite: Floats,
) -> bool:
    """Reads logits into ``out``; writes each pixel's largest one and its class, and 0 if all are below infinity.

    Returns:
        Whether all logits of the block are finite.
    """
    if planes.are_points[plane]:
        read_points(planes.logits[plane], first, out, start, len(maximum))
    else:
        row_bytes = np.uint64(planes.pixels[plane] * FLOAT_BYTES[logits_kind])
        for k in range(len(out)):
            address = planes.logits[plane] + row_bytes * np.uint64(k)
            widen(logits_kind, address, first, out[k, start : start + len(maximum)])
    is_finite = find_largest(out, start, maximum, prediction)
    not_finite[:] = f32(0)
    if not is_finite:
        mark_infinite(out, start, not_finite)
    return is_finite


@compiled
def prepare_probabilities(
    tasks: Integers,
    blocks: Blocks,
    planes: Planes,
    logits_kind: int,
    labelling: Labelling,
    tolerance: f32,
    errors: npt.NDArray[np.float32],
    codes: Codes,
    counts: Counts,
) -> None:
    """Like ``prepare``, for probabilities as input. They need not sum to exactly 1, so the label's error is 1 - p."""
    channels, joints = labelling.values, len(counts.faults) // 3
    size = block_pixels(channels, READ_ELEMENTS, READ_PIXELS)
    maximum, prediction, not_finite = np.empty(size, f32), np.empty(size, np.int32), np.empty(size, f32)
    smallest = np.empty(size, f32)
    local = np.empty((3, channels), np.int64)
    while True:
        task = claim(tasks, len(blocks.plane))
        if task >= len(blocks.plane):
            break
        plane = blocks.plane[task]
        joint = planes.joint[plane]
        local[:] = 0
        for first in range(blocks.first[task], blocks.last[task], size):
            n = min(size, blocks.last[task] - first)
            start = planes.start[plane] + first
            code = codes[start : start + n]
            m, p, nf, low = maximum[:n], prediction[:n], not_finite[:n], smallest[:n]
            bad = read_codes(planes.label_kind[plane], planes.labels[plane], first, labelling, code)
            _read(planes, plane, logits_kind, first, errors, start, m, p, nf)
            low[:] = errors[0, start : start + n]
            for k in range(channels):
                row = errors[k, start : start + n]
                for i in range(n):
                    low[i] = min(low[i], row[i])
                # Errors are not negative: values below 0 within the tolerance become 0, and -0.0 by the sum.
                for i in range(n):
                    row[i] = max(f32(1) - row[i] if code[i] == k else row[i], f32(0)) + f32(0)
            for i in range(n):
                nf[i] += f32(0) if low[i] > f32(-np.inf) else f32(1)
            infinite = _count(code, p, nf, labelling, local)
            out_of_range = 0
            for i in range(n):
                outside = low[i] < -tolerance or m[i] > f32(1) + tolerance
                out_of_range += 1 if outside and nf[i] == f32(0) and code[i] != labelling.void else 0
            atomic_add(counts.faults, joint, bad)
            atomic_add(counts.faults, joints + joint, infinite)
            atomic_add(counts.faults, 2 * joints + joint, out_of_range)
        _add_counts(counts, local, plane)


@compiled
def _count(
    code: Codes, prediction: npt.NDArray[np.int32], not_finite: Floats, labelling: Labelling, local: Integers
) -> int:
    """Adds to (labels, predictions, hits) of each class; returns how many valid pixels are not finite."""
    infinite = 0
    for i in range(len(code)):
        c = np.int64(code[i])
        if c != labelling.void:
            p = prediction[i]
            local[0, c] += 1
            local[1, p] += 1
            local[2, c] += 1 if c == p else 0
            infinite += 0 if not_finite[i] == f32(0) else 1
    return infinite


@compiled
def _add_counts(counts: Counts, local: Integers, plane: int) -> None:
    channels = local.shape[1]
    for k in range(channels):
        atomic_add(counts.labels, plane * channels + k, local[0, k])
        atomic_add(counts.predictions, plane * channels + k, local[1, k])
        atomic_add(counts.hits, plane * channels + k, local[2, k])


@compiled
def finish(
    tasks: Integers,
    blocks: Blocks,
    planes: Planes,
    labelling: Labelling,
    errors: npt.NDArray[np.float32],
    codes: Codes,
    label_probability: Floats,
    entropies: CrossEntropies,
    scored: npt.NDArray[np.bool_],
) -> None:
    """Overwrites the gradients g with respect to the errors by the gradients with respect to the logits.

    Let h_k = dloss/dp_k, which is -g_y for the label's class y and g_k for the others; then
    dloss/dz_k = p_k (h_k - sum_j p_j h_j). For the label's class, 1 - p_y is computed as the sum of the other
    probabilities, so nothing cancels (docs/mathematics.md, section 8).

    Args:
        scored: (planes, K): the rows in which g has been written; g is 0 in the others.
    """
    channels = labelling.values
    size = block_pixels(channels, WRITTEN_ELEMENTS, WRITTEN_PIXELS)
    others, label_g, label_error, pull = (
        np.empty(size, f32),
        np.empty(size, f32),
        np.empty(size, f32),
        np.empty(size, f32),
    )
    while True:
        task = claim(tasks, len(blocks.plane))
        if task >= len(blocks.plane):
            break
        plane = blocks.plane[task]
        joint, pixels = planes.joint[plane], planes.pixels[plane]
        grads = numba.carray(pointer(planes.grads[plane]), (channels, pixels), np.float32)
        void = i32(labelling.void)
        for first in range(blocks.first[task], blocks.last[task], size):
            n = min(size, blocks.last[task] - first)
            start = planes.start[plane] + first
            code, py = codes[start : start + n], label_probability[start : start + n]
            o, gy, ey, pulled = others[:n], label_g[:n], label_error[:n], pull[:n]
            ahead = min(size, blocks.last[task] - first - n)
            any_void = _has(code, void)
            for k in range(channels):
                if not scored[plane, k]:
                    grads[k, first : first + n] = f32(0)
            gather(errors, start, code, ey)
            take(grads, first, code, gy)
            add_products(errors, start, grads, first, o)
            pulled[:] = f32(0)
            for term in range(len(entropies.smoothing)):
                weights, counted = entropies.weights[term], entropies.counted[term]
                factor = entropies.pull[term, joint]
                for i in range(n):
                    pulled[i] += weights[code[i]] * counted[code[i]] * factor
            for i in range(n):
                grad = -py[i] * (gy[i] * ey[i] + o[i]) - pulled[i] * ey[i]
                o[i] = py[i] * gy[i] - o[i] + pulled[i]
                gy[i] = grad
            for k in range(channels):
                row, g = errors[k, start : start + n], grads[k, first : first + n]
                # The next block: otherwise each of its rows, which lie in other pages, would have to be waited for.
                prefetch(errors[k, start + n : start + n + ahead])
                prefetch(grads[k, first + n : first + n + ahead])
                if any_void:
                    for i in range(n):
                        g[i] = row[i] * (g[i] + o[i]) if i32(code[i]) != void else f32(0)
                else:
                    for i in range(n):
                        g[i] = row[i] * (g[i] + o[i])
            put(gy, code, labelling.void, grads, first)
            for term in range(len(entropies.smoothing)):
                if entropies.smoothing[term] > f32(0):
                    add_spread(entropies, term, joint, code, py, errors, start, grads, first)
            if planes.are_points[plane]:
                write_points(planes.points[plane], first, grads, n)


@compiled
def _has(code: Codes, void: i32) -> bool:
    """Whether any pixel is void."""
    found = i32(0)
    for i in range(len(code)):
        found |= i32(1) if i32(code[i]) == void else i32(0)
    return found > 0


@compiled
def clear(planes: Planes, first_plane: int, stop_plane: int, channels: int) -> None:
    """Sets the gradients of planes to 0."""
    for plane in range(first_plane, stop_plane):
        numba.carray(pointer(planes.grads[plane]), (channels * planes.pixels[plane],), np.float32)[:] = f32(0)
