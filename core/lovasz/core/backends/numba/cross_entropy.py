"""Cross-entropy terms: the loss of each pixel, exact sums of these losses, and the gradient of label smoothing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numpy import float32 as f32

from lovasz.core.backends.numba.elementary import log, log1p, rounded
from lovasz.core.backends.numba.intrinsics import atomic_add, atomic_max, compiled, float_bits
from lovasz.core.backends.numba.planes import Blocks, Codes, Floats, Integers, Planes, claim


class CrossEntropies(NamedTuple):
    """The T cross-entropy terms of a batch; T may be 0.

    The gradient of a term with respect to logit k of a pixel with label y is

        pull x weight_y x (p_k - [k = y]) + spread x (sum of weights x p_k - weight_k).

    Attributes:
        weights: float32, (T, codes): the weight of each class; 0 for void.
        counted: float32, (T, codes): 0 for codes that are void for the term, 1 for the others.
        smoothing: float32, (T,): label smoothing.
        losses: float32, (T, pixels): written: each pixel's weighted loss.
        largest: int64, (T x joints): written: the bits of the largest loss of a pixel.
        pull: float32, (T, joints).
        spread: float32, (T, joints): 0 without label smoothing.
    """

    weights: npt.NDArray[np.float32]
    counted: npt.NDArray[np.float32]
    smoothing: Floats
    losses: npt.NDArray[np.float32]
    largest: Integers
    pull: npt.NDArray[np.float32]
    spread: npt.NDArray[np.float32]


@compiled
def weighted_logits(
    entropies: CrossEntropies, term: int, logits: npt.NDArray[np.float32], start: int, maximum: Floats
) -> None:
    """Writes the sum over classes of weight x (logit - maximum) to ``losses``, which ``pixel_losses`` overwrites."""
    n = len(maximum)
    sums = entropies.losses[term, start : start + n]
    sums[:] = f32(0)
    for k in range(len(logits)):
        row, weight = logits[k, start : start + n], entropies.weights[term, k]
        for i in range(n):
            sums[i] += weight * (row[i] - maximum[i])


@compiled
def pixel_losses(
    entropies: CrossEntropies,
    term: int,
    code: Codes,
    total: Floats,
    others: Floats,
    label_exponential: Floats,
    label_shifted: Floats,
    losses: Floats,
    joint: int,
    joints: int,
) -> None:
    """Writes each pixel's loss; with label smoothing, ``losses`` holds the result of ``weighted_logits`` before."""
    weights, counted = entropies.weights[term], entropies.counted[term]
    smoothing = entropies.smoothing[term]
    channels = len(weights) - 1
    all_weights = f32(0)
    for k in range(channels):
        all_weights += weights[k]
    share = smoothing / f32(channels)
    largest = f32(0)
    for i in range(len(code)):
        log_total = log(total[i])
        # Near p = 1, log1p keeps the digits that the difference loses.
        likely = label_exponential[i] > others[i]
        ratio = others[i] / label_exponential[i] if likely else f32(0)
        negative_log = log1p(ratio) if likely else log_total - label_shifted[i]
        loss = (f32(1) - smoothing) * negative_log * weights[code[i]]
        if smoothing > f32(0):
            loss += share * (all_weights * log_total - losses[i])
        loss = loss if counted[code[i]] > f32(0) else f32(0)
        losses[i] = loss
        largest = max(largest, loss)
    atomic_max(entropies.largest, term * joints + joint, np.int64(float_bits(largest)))


@compiled
def add_losses(
    tasks: Integers,
    blocks: Blocks,
    planes: Planes,
    losses: Floats,
    scales: npt.NDArray[np.float64],
    sums: Integers,
) -> None:
    """Adds up each joint's losses as integers: each loss is rounded to a multiple of 1 / scale."""
    while True:
        task = claim(tasks, len(blocks.plane))
        if task >= len(blocks.plane):
            break
        plane = blocks.plane[task]
        start, joint = planes.start[plane], planes.joint[plane]
        local, scale = np.int64(0), scales[joint]
        for i in range(start + blocks.first[task], start + blocks.last[task]):
            local += rounded(np.float64(losses[i]) * scale)
        atomic_add(sums, joint, local)


@compiled
def add_spread(
    entropies: CrossEntropies,
    term: int,
    joint: int,
    code: Codes,
    label_probability: Floats,
    errors: npt.NDArray[np.float32],
    start: int,
    grads: npt.NDArray[np.float32],
    first: int,
) -> None:
    """Adds the part of the gradient with ``spread``, from label smoothing."""
    weights, counted = entropies.weights[term], entropies.counted[term]
    total = f32(0)
    for k in range(len(grads)):
        total += weights[k]
    for k in range(len(grads)):
        for i in range(len(code)):
            spread = counted[code[i]] * entropies.spread[term, joint]
            p = label_probability[i] if code[i] == k else errors[k, start + i]
            if spread != f32(0):
                grads[k, first + i] += spread * (total * p - weights[k])
