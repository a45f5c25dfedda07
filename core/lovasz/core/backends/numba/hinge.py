"""The errors of the hinge, computed from the logits of binary problems."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numpy import float32 as f32

from lovasz.core.backends.numba.intrinsics import atomic_add, atomic_max, compiled, float_bits
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


@compiled
def prepare(
    tasks: Integers,
    blocks: Blocks,
    planes: Planes,
    logits_kind: int,
    channels: int,
    labelling: Labelling,
    errors: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    counts: Counts,
    valid: Integers,
    largest: Integers,
) -> None:
    """Writes errors max(0, 1 - s x) and codes, both (K, pixels), and counts pixels.

    In ``counts``, ``labels`` are foreground pixels, ``predictions`` are pixels with logits above 0, ``hits`` are pixels
    that are both.

    Args:
        valid: (planes x K), written: the number of pixels that are not void.
        largest: (planes x K), written: the bits of the largest error.
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
                    row[i] = max(f32(1) - (row[i] if code[i] == 1 else -row[i]), f32(0))
                    not_finite[i] = f32(0) if is_below and row[i] < f32(np.inf) else f32(1)
                top, infinite = f32(0), 0
                for i in range(n):
                    counted = code[i] != labelling.void
                    infinite += 1 if counted and not_finite[i] != f32(0) else 0
                    top = max(top, row[i]) if counted and not_finite[i] == f32(0) else top
                atomic_add(counts.faults, joint, bad)
                atomic_add(counts.faults, joints + joint, infinite)
                atomic_max(largest, place, np.int64(float_bits(top)))


@compiled
def _add_counts(logits: Floats, code: Codes, void: int, counts: Counts, valid: Integers, place: int) -> None:
    counted, foreground, predicted, hits = 0, 0, 0, 0
    for i in range(len(code)):
        is_counted = code[i] != void
        is_foreground = code[i] == 1
        is_predicted = is_counted and logits[i] > f32(0)
        counted += 1 if is_counted else 0
        foreground += 1 if is_foreground else 0
        predicted += 1 if is_predicted else 0
        hits += 1 if is_predicted and is_foreground else 0
    atomic_add(valid, place, counted)
    atomic_add(counts.labels, place, foreground)
    atomic_add(counts.predictions, place, predicted)
    atomic_add(counts.hits, place, hits)
