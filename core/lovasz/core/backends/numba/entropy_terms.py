"""The cross-entropy terms of one computation on the CPU, also binary ones: their memory, losses and factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lovasz.core.backends.numba import binary
from lovasz.core.backends.numba.binary import BinaryCrossEntropies
from lovasz.core.backends.numba.call import Call
from lovasz.core.backends.numba.cross_entropy import CrossEntropies, add_losses, set_all_factors
from lovasz.core.backends.numba.fixed_point import scales, sum_bits
from lovasz.core.computed import TermValues
from lovasz.core.plan import Term


def cross_entropies(call: Call, *, with_losses: bool = True) -> CrossEntropies:
    """The cross-entropy terms of a batch, with memory for what is written.

    Args:
        with_losses: whether there is memory for the losses of all pixels.
    """
    of_plan = call.outline.cross_entropies
    terms, joints = len(of_plan.smoothing), len(call.plan.sizes)
    if terms == 0:
        return of_plan
    scale, mean = np.empty((2, terms, joints))
    pull, spread = np.empty((2, terms, joints), np.float32)
    largest, sums = np.zeros((2, terms * joints), np.int64)
    pixels = call.plan.pixels if with_losses else 0
    losses = call.scratch.array("pixel losses", (terms, pixels), np.float32)
    return of_plan._replace(losses=losses, largest=largest, scale=scale, sums=sums, mean=mean, pull=pull, spread=spread)


def add_cross_entropies(call: Call, entropies: CrossEntropies, labels: npt.NDArray[np.int64]) -> None:
    """Adds up the losses of pixels, and writes the factors of the gradients.

    Args:
        labels: the pixels of each class in each joint.
    """
    if len(entropies.smoothing) == 0:
        return
    pixels = call.joint_pixels
    bits = call.outline.sum_bits if call.ranks is None else sum_bits(pixels)
    set_all_factors(entropies, labels, pixels, bits)
    call.run_blocks(add_losses, entropies=entropies)
    if call.ranks is not None:
        call.ranks.add([entropies.sums])


def values_of_cross_entropy(entropies: CrossEntropies, t: int) -> TermValues:
    """The values of a cross-entropy term: the weighted mean over its pixels."""
    scale = entropies.scale[t : t + 1]
    losses = entropies.sums.reshape(entropies.scale.shape)[t : t + 1] / scale * entropies.mean[t : t + 1]
    return TermValues(losses, np.ones_like(losses, np.bool_))


def binary_cross_entropies(call: Call) -> BinaryCrossEntropies:
    """The binary cross-entropy terms of a batch.

    ``values_of_binary_cross_entropy`` fills in the factors of their gradients.
    """
    of_plan = call.outline.binary_cross_entropies
    terms = len(of_plan.ignored)
    if terms == 0:
        return of_plan
    return of_plan._replace(
        losses=call.rows("pixel losses of labels", call.plan.channels, np.float32),
        largest=np.zeros_like(of_plan.largest),
        factor=np.zeros((terms, len(call.plan.sizes))),
    )


def values_of_binary_cross_entropy(
    call: Call,
    term: Term,
    t: int,
    entropies: BinaryCrossEntropies,
    counted: npt.NDArray[np.int64],
    codes: npt.NDArray[Any],
) -> TermValues:
    """Computes the loss of a term, the mean over its pixels and labels, and the factor of its gradient.

    Args:
        counted: int64, shape (joints,): the number of its pixels, once for each label.
    """
    joints = len(call.plan.sizes)
    mean = np.divide(1.0, counted, out=np.zeros(joints), where=counted > 0)
    pixels = call.joint_pixels * call.plan.channels
    largest_weight = max(1.0, float(term.pos_weight.max()))
    units = scales(entropies.largest, pixels, sum_bits(pixels), largest_weight)
    sums = np.zeros(joints, np.int64)
    call.run_blocks(binary.add_losses, codes=codes, entropies=entropies, term=t, scales=units, sums=sums)
    if call.ranks is not None:
        call.ranks.add([sums])
    entropies.factor[t] = term.weight * mean
    losses = (sums / units * mean)[None]
    return TermValues(losses, np.ones_like(losses, np.bool_))
