"""Sums of float32 as integers: exact, so that they do not depend on the order of the summands."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from lovasz.core.backends.numba.intrinsics import bits_float, compiled, double_bits, inlined
from lovasz.core.backends.numba.planes import Integers
from lovasz.core.computed import FIXED_POINT_BITS

_ROUNDED_BITS = 51
"""``rounded`` takes numbers of up to 2^51."""
_ROUND_DOUBLE = 6755399441055744.0  # 1.5 x 2^52
_ROUND_DOUBLE_BITS = np.int64(0x4338000000000000)
_MOST_EXPONENT = 1000


def sum_bits(summands: Integers) -> Integers:
    """The bits of sums: each is below 2^bits, and no summand exceeds 2^51, as it is at most a share of the bound.

    Args:
        summands: the number of summands of each sum, int64.
    """
    bits: Integers = np.minimum(FIXED_POINT_BITS, _ROUNDED_BITS + np.frexp(summands)[1] - 1).astype(np.int64)
    return bits


@inlined
def rounded(x: float) -> np.int64:
    """The integer nearest to x, |x| <= 2^51; the processor's own conversion does not vectorize."""
    return double_bits(x + _ROUND_DOUBLE) - _ROUND_DOUBLE_BITS


@compiled
def scale(largest: int, summands: int, bits: int, weight: float) -> float:
    """The scale of the integers that losses of pixels are added as.

    Args:
        largest: the bits of the largest loss of a pixel.
        summands: how many losses are added.
        bits: ``sum_bits`` of this number.
        weight: the largest factor of a loss.
    """
    loss = np.float64(bits_float(np.int32(largest)))
    bound = loss * summands * weight if np.isfinite(loss) else 0.0
    return math.ldexp(1.0, min(bits - math.frexp(bound)[1], _MOST_EXPONENT))


@compiled
def scales(largest: Integers, summands: Integers, bits: Integers, weight: float) -> npt.NDArray[np.float64]:
    """``scale`` of several sums."""
    result = np.empty(len(largest))
    for j in range(len(largest)):
        result[j] = scale(largest[j], summands[j], bits[j], weight)
    return result
