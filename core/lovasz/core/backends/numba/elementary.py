"""Exponential and logarithm in float32, and sums, made of operations that compilers can vectorize.

The polynomials and range reductions are those of Moshier's Cephes library (expf, logf). The relative error is below
1.3e-7 in the ranges given.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numpy import float32 as f32
from numpy import int32 as i32

from lovasz.core.backends.numba.intrinsics import bits_float, float_bits, fma, inlined

_LOWEST = f32(-87.0)
_LOG2_E = f32(1.4426950408889634)
_ROUND = f32(12582912.0)  # 1.5 x 2^23: floats of this size have no fraction, so adding it rounds to an integer.
_MINUS_LN2_HIGH = f32(-0.693359375)
_MINUS_LN2_LOW = f32(2.12194440e-4)
_E0, _E1, _E2 = f32(1.9875691500e-4), f32(1.3981999507e-3), f32(8.3334519073e-3)
_E3, _E4, _E5 = f32(4.1665795894e-2), f32(1.6666665459e-1), f32(5.0000001201e-1)

_SQRT_HALF_BITS = i32(0x3F3504F3)
_ONE_BITS = i32(0x3F800000)
_LN2_HIGH = f32(0.693359375)
_LN2_LOW = f32(-2.12194440e-4)
_L0, _L1, _L2 = f32(7.0376836292e-2), f32(-1.1514610310e-1), f32(1.1676998740e-1)
_L3, _L4, _L5 = f32(-1.2420140846e-1), f32(1.4249322787e-1), f32(-1.6668057665e-1)
_L6, _L7, _L8 = f32(2.0000714765e-1), f32(-2.4999993993e-1), f32(3.3333331174e-1)


@inlined
def exp(x: f32) -> f32:
    """e^x for x <= 0; 0 for x < -87, where e^x is close to the smallest normal number or below."""
    clamped = max(x, _LOWEST)
    shifted = fma(clamped, _LOG2_E, _ROUND)
    n = shifted - _ROUND
    r = fma(n, _MINUS_LN2_LOW, fma(n, _MINUS_LN2_HIGH, clamped))
    p = fma(_E0, r, _E1)
    p = fma(p, r, _E2)
    p = fma(p, r, _E3)
    p = fma(p, r, _E4)
    p = fma(p, r, _E5)
    p = fma(p, r * r, r) + f32(1.0)
    return bits_float(float_bits(p) + (float_bits(shifted) << i32(23))) if x >= _LOWEST else f32(0.0)


@inlined
def log(x: f32) -> f32:
    """The natural logarithm of a positive normal number."""
    bits = float_bits(x) - _SQRT_HALF_BITS
    exponent = bits >> i32(23)
    r = bits_float((bits & i32(0x7FFFFF)) + _SQRT_HALF_BITS) - f32(1.0)  # in [sqrt(1/2), sqrt(2)) - 1
    n = f32(exponent)
    square = r * r
    p = fma(_L0, r, _L1)
    p = fma(p, r, _L2)
    p = fma(p, r, _L3)
    p = fma(p, r, _L4)
    p = fma(p, r, _L5)
    p = fma(p, r, _L6)
    p = fma(p, r, _L7)
    p = fma(p, r, _L8)
    p = fma(p * r, square, n * _LN2_LOW)
    p = fma(f32(-0.5), square, p)
    return fma(n, _LN2_HIGH, r + p)


@inlined
def log1p(x: f32) -> f32:
    """log(1 + x) for x in [0, 1], accurate for small x, too."""
    whole = f32(1.0) + x
    return log(whole) + (x - (whole - f32(1.0))) / whole


@inlined
def ordered_sum(values: npt.NDArray[np.float64]) -> float:
    """Sums in a fixed order, as four independent partial sums."""
    s0, s1, s2, s3 = 0.0, 0.0, 0.0, 0.0
    whole = len(values) // 4 * 4
    for i in range(0, whole, 4):
        s0, s1, s2, s3 = s0 + values[i], s1 + values[i + 1], s2 + values[i + 2], s3 + values[i + 3]
    for i in range(whole, len(values)):
        s0 += values[i]
    return (s0 + s1) + (s2 + s3)
