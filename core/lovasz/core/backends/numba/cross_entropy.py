"""Cross-entropy terms: the loss of each pixel, exact sums of these losses, and the gradient of label smoothing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numpy import float32 as f32

from lovasz.core.backends.numba.elementary import log, log1p, ordered_sum
from lovasz.core.backends.numba.fixed_point import rounded, scale
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
        class_weights: float64, (T, K).
        label_factor, spread_factor: float64, (T,): those of the :class:`~lovasz.core.plan.Term`.
        losses: float32, (T, pixels): written: each pixel's weighted loss.
        largest: int64, (T x joints): written: the bits of the largest loss of a pixel.
        scale: float64, (T, joints): written: the losses are added as multiples of 1 / scale.
        sums: int64, (T x joints): written: the sum of the losses of a joint, as such multiples.
        mean: float64, (T, joints): written: 1 over the weight of a joint's pixels; 0 if it has none.
        pull: float32, (T, joints): written.
        spread: float32, (T, joints): written: 0 without label smoothing.
    """

    weights: npt.NDArray[np.float32]
    counted: npt.NDArray[np.float32]
    smoothing: Floats
    class_weights: npt.NDArray[np.float64]
    label_factor: npt.NDArray[np.float64]
    spread_factor: npt.NDArray[np.float64]
    losses: npt.NDArray[np.float32]
    largest: Integers
    scale: npt.NDArray[np.float64]
    sums: Integers
    mean: npt.NDArray[np.float64]
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
def set_factors(entropies: CrossEntropies, joint: int, labels: Integers, pixels: int, bits: int) -> None:
    """Writes ``scale``, ``mean``, ``pull`` and ``spread`` of a joint, whose losses are known.

    Args:
        labels: the number of its pixels of each class.
        pixels: the number of all its pixels.
        bits: ``sum_bits`` of this number.
    """
    joints, weights = entropies.scale.shape[1], np.empty(len(labels))
    for term in range(len(entropies.smoothing)):
        for k in range(len(labels)):
            weights[k] = labels[k] * entropies.counted[term, k] * entropies.class_weights[term, k]
        total = ordered_sum(weights)
        mean = 1.0 / total if total > 0.0 else 0.0
        entropies.scale[term, joint] = scale(entropies.largest[term * joints + joint], pixels, bits, 1.0)
        entropies.mean[term, joint] = mean
        entropies.pull[term, joint] = entropies.label_factor[term] * mean
        entropies.spread[term, joint] = entropies.spread_factor[term] * mean


@compiled
def set_all_factors(entropies: CrossEntropies, labels: Integers, pixels: Integers, bits: Integers) -> None:
    """``set_factors`` of all joints.

    Args:
        labels: (K, joints).
        pixels, bits: (joints,).
    """
    of_joint = np.empty(len(labels), np.int64)
    for joint in range(len(pixels)):
        for k in range(len(labels)):
            of_joint[k] = labels[k, joint]
        set_factors(entropies, joint, of_joint, pixels[joint], bits[joint])


@compiled
def add_losses(tasks: Integers, blocks: Blocks, planes: Planes, entropies: CrossEntropies) -> None:
    """Adds up the losses of each joint's pixels in ``sums``: each is rounded to a multiple of 1 / scale."""
    joints = entropies.scale.shape[1]
    while True:
        task = claim(tasks, len(blocks.plane))
        if task >= len(blocks.plane):
            break
        plane = blocks.plane[task]
        start, joint = planes.start[plane], planes.joint[plane]
        for term in range(len(entropies.smoothing)):
            losses = entropies.losses[term, start + blocks.first[task] : start + blocks.last[task]]
            local, units = np.int64(0), entropies.scale[term, joint]
            for i in range(len(losses)):
                local += rounded(np.float64(losses[i]) * units)
            atomic_add(entropies.sums, term * joints + joint, local)


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
