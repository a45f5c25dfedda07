"""Binary losses: the errors of the hinge or of the sigmoid, binary cross-entropy, and the way back to logits.

The margin z of a pixel is its logit, with the sign changed where the label is 0: large where the logit is right.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from numpy import float32 as f32
from numpy import int32 as i32

from lovasz.core.backends.numba.elementary import exp, log1p
from lovasz.core.backends.numba.fixed_point import rounded
from lovasz.core.backends.numba.intrinsics import atomic_add, atomic_max, compiled, float_bits, inlined, pointer
from lovasz.core.backends.numba.planes import (
    FLOAT_BYTES,
    LABEL_BYTES,
    Blocks,
    Codes,
    Floats,
    Integers,
    Labelling,
    Planes,
    claim,
    read_codes,
    widen,
)
from lovasz.core.backends.numba.softmax import Counts

_BLOCK_PIXELS = 2048


class BinaryCrossEntropies(NamedTuple):
    """The T binary cross-entropy terms of a batch; T may be 0.

    Attributes:
        ignored: int64, (T,): the code that is void for the term, but not for all terms; ``Labelling.void`` if none is.
        pos_weight: float64, (T, K): the factor of a pixel's loss where the label is 1.
        losses: float32, (K, pixels), written: each pixel's loss before this factor; no rows if T is 0.
        largest: int64, (joints,), written: the bits of the largest of these losses.
        factor: float64, (T, joints): the weight of the term over the number of its pixels.
    """

    ignored: Integers
    pos_weight: npt.NDArray[np.float64]
    losses: npt.NDArray[np.float32]
    largest: Integers
    factor: npt.NDArray[np.float64]


@compiled
def prepare(
    tasks: Integers,
    blocks: Blocks,
    planes: Planes,
    logits_kind: int,
    channels: int,
    labelling: Labelling,
    is_sigmoid: bool,
    entropies: BinaryCrossEntropies,
    errors: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    counts: Counts,
    valid: Integers,
    positive: Integers,
    largest: Integers,
    largest_foreground: Integers,
) -> None:
    """Writes errors and codes, both (K, pixels), and the losses of ``entropies``, and counts pixels.

    The error of a margin z is sigmoid(-z) if ``is_sigmoid``, else max(0, 1 - z). In ``counts``, ``labels`` are
    foreground pixels, ``predictions`` are pixels with logits above 0, ``hits`` are pixels that are both.

    Args:
        valid: (planes x K), written: the number of pixels that are not void.
        positive: (planes x K), written: the number of these whose error is above 0.
        largest, largest_foreground: (planes x K), written: the bits of the largest error, and of that of foreground.
    """
    joints = len(counts.faults) // 3
    flags = np.empty(_BLOCK_PIXELS, np.float32)
    while True:
        task = claim(tasks, len(blocks.plane))
        if task >= len(blocks.plane):
            break
        plane = blocks.plane[task]
        joint, pixels = planes.joint[plane], planes.pixels[plane]
        row_bytes = np.uint64(pixels * FLOAT_BYTES[logits_kind])
        label_bytes = LABEL_BYTES[planes.label_kind[plane]]
        for k in range(channels):
            logits = planes.logits[plane] + row_bytes * np.uint64(k)
            labels = planes.labels[plane] + np.uint64(pixels * label_bytes * k)
            place = plane * channels + k
            for first in range(blocks.first[task], blocks.last[task], _BLOCK_PIXELS):
                n = min(_BLOCK_PIXELS, blocks.last[task] - first)
                start = planes.start[plane] + first
                row, code, not_finite = errors[k, start : start + n], codes[k, start : start + n], flags[:n]
                bad = read_codes(planes.label_kind[plane], labels, first, labelling, code)
                widen(logits_kind, logits, first, row)
                _add_counts(row, code, labelling.void, counts, valid, place)
                for i in range(n):
                    is_below = row[i] < f32(np.inf)
                    row[i] = row[i] if code[i] == 1 else -row[i]
                    not_finite[i] = f32(0) if is_below and row[i] > f32(-np.inf) else f32(1)
                if len(entropies.losses) > 0:
                    _pixel_losses(row, code, not_finite, labelling.void, entropies, k, start, joint)
                if is_sigmoid:
                    for i in range(n):
                        row[i] = _error(row[i])
                else:
                    for i in range(n):
                        row[i] = max(f32(1) - row[i], f32(0))
                top, top_foreground, infinite, above, void = i32(0), i32(0), i32(0), i32(0), i32(labelling.void)
                for i in range(n):  # Errors are not negative, so their bits have their order.
                    counted = i32(code[i]) != void
                    is_finite = not_finite[i] == f32(0)
                    infinite = i32(infinite + (i32(1) if counted & (not is_finite) else i32(0)))
                    bits = float_bits(row[i]) if counted & is_finite else i32(0)
                    top = max(top, bits)
                    top_foreground = max(top_foreground, bits if code[i] == 1 else i32(0))
                    above = i32(above + (i32(1) if bits > i32(0) else i32(0)))
                atomic_add(counts.faults, joint, bad)
                atomic_add(counts.faults, joints + joint, np.int64(infinite))
                atomic_add(positive, place, np.int64(above))
                atomic_max(largest, place, np.int64(top))
                atomic_max(largest_foreground, place, np.int64(top_foreground))


@inlined
def _error(margin: f32) -> f32:
    """sigmoid(-z)."""
    exponential = exp(-abs(margin))
    return (exponential if margin >= f32(0) else f32(1)) / (f32(1) + exponential)


@inlined
def _slope(margin: f32) -> f32:
    """sigmoid(z) (1 - sigmoid(z)), without cancellation."""
    exponential = exp(-abs(margin))
    over_total = f32(1) / (f32(1) + exponential)
    return exponential * over_total * over_total


@compiled
def _pixel_losses(
    margins: Floats,
    code: Codes,
    not_finite: Floats,
    void: int,
    entropies: BinaryCrossEntropies,
    k: int,
    start: int,
    joint: int,
) -> None:
    """Writes -log(sigmoid(z)) = max(-z, 0) + log(1 + e^-|z|); 0 for pixels that are void for all terms."""
    losses = entropies.losses[k, start : start + len(code)]
    largest = f32(0)
    for i in range(len(code)):
        losses[i] = max(-margins[i], f32(0)) + log1p(exp(-abs(margins[i])))
    for i in range(len(code)):
        losses[i] = losses[i] if code[i] != void and not_finite[i] == f32(0) else f32(0)
    for i in range(len(code)):
        largest = max(largest, losses[i])
    atomic_max(entropies.largest, joint, np.int64(float_bits(largest)))


@compiled
def add_losses(
    tasks: Integers,
    blocks: Blocks,
    planes: Planes,
    codes: npt.NDArray[np.uint8],
    entropies: BinaryCrossEntropies,
    term: int,
    scales: npt.NDArray[np.float64],
    sums: Integers,
) -> None:
    """Adds up each joint's weighted losses as integers: each is rounded to a multiple of 1 / scale."""
    ignored = entropies.ignored[term]
    while True:
        task = claim(tasks, len(blocks.plane))
        if task >= len(blocks.plane):
            break
        plane = blocks.plane[task]
        start, joint = planes.start[plane], planes.joint[plane]
        local = np.int64(0)
        for k in range(len(entropies.losses)):
            first, last = start + blocks.first[task], start + blocks.last[task]
            losses, code = entropies.losses[k, first:last], codes[k, first:last]
            foreground = scales[joint] * entropies.pos_weight[term, k] if ignored != 1 else 0.0
            background = scales[joint] if ignored != 0 else 0.0
            for i in range(len(losses)):
                local += rounded(np.float64(losses[i]) * (foreground if code[i] == 1 else background))
        atomic_add(sums, joint, local)


@compiled
def finish(
    tasks: Integers,
    blocks: Blocks,
    planes: Planes,
    logits_kind: int,
    labelling: Labelling,
    is_sigmoid: bool,
    entropies: BinaryCrossEntropies,
    codes: npt.NDArray[np.uint8],
    scored: npt.NDArray[np.bool_],
) -> None:
    """Turns the gradients of the Lovász terms into those with respect to the logits, and adds those of ``entropies``.

    For the hinge the two are the same. For the sigmoid, dm/dx is -s p (1 - p); the sign s is already in the gradients.

    Args:
        scored: (planes, K): the rows in which gradients have been written; they are 0 in the others.
    """
    channels = scored.shape[1]
    values = np.empty(_BLOCK_PIXELS, np.float32)
    while True:
        task = claim(tasks, len(blocks.plane))
        if task >= len(blocks.plane):
            break
        plane = blocks.plane[task]
        joint, pixels = planes.joint[plane], planes.pixels[plane]
        row_bytes = np.uint64(pixels * FLOAT_BYTES[logits_kind])
        grads = numba.carray(pointer(planes.grads[plane]), (channels, pixels), np.float32)
        for k in range(channels):
            logits = planes.logits[plane] + row_bytes * np.uint64(k)
            for first in range(blocks.first[task], blocks.last[task], _BLOCK_PIXELS):
                n = min(_BLOCK_PIXELS, blocks.last[task] - first)
                start = planes.start[plane] + first
                margins, code, grad = values[:n], codes[k, start : start + n], grads[k, first : first + n]
                widen(logits_kind, logits, first, margins)
                for i in range(n):
                    margins[i] = margins[i] if code[i] == 1 else -margins[i]
                if not scored[plane, k]:
                    grad[:] = f32(0)
                elif is_sigmoid:
                    for i in range(n):
                        grad[i] = grad[i] * _slope(margins[i]) if grad[i] != f32(0) else f32(0)
                if len(entropies.losses) > 0:
                    for i in range(n):
                        margins[i] = _error(margins[i])
                for term in range(len(entropies.ignored)):
                    foreground = -f32(entropies.factor[term, joint] * entropies.pos_weight[term, k])
                    background, ignored = f32(entropies.factor[term, joint]), entropies.ignored[term]
                    for i in range(n):
                        factor = foreground if code[i] == 1 else background
                        counted = code[i] != ignored and code[i] != labelling.void
                        grad[i] += margins[i] * factor if counted else f32(0)


@compiled
def _add_counts(logits: Floats, code: Codes, void: int, counts: Counts, valid: Integers, place: int) -> None:
    counted, foreground, predicted, hits, void_code = i32(0), i32(0), i32(0), i32(0), i32(void)
    for i in range(len(code)):  # 32 bits and no branches, for vectors.
        own = i32(code[i])
        is_counted, is_foreground = own != void_code, own == i32(1)
        is_predicted = is_counted & (logits[i] > f32(0))
        counted = i32(counted + (i32(1) if is_counted else i32(0)))
        foreground = i32(foreground + (i32(1) if is_foreground else i32(0)))
        predicted = i32(predicted + (i32(1) if is_predicted else i32(0)))
        hits = i32(hits + (i32(1) if is_predicted & is_foreground else i32(0)))
    atomic_add(valid, place, np.int64(counted))
    atomic_add(counts.labels, place, np.int64(foreground))
    atomic_add(counts.predictions, place, np.int64(predicted))
    atomic_add(counts.hits, place, np.int64(hits))
