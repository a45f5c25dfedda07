"""Elementary functions on a GPU, with the accuracy of float32."""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950216293335)
"""log2(e), rounded to float32."""
_LOG2_E_REST = tl.constexpr(1.925963033500665e-08)
"""log2(e) - _LOG2_E."""
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exponential(x):
    """exp(x) for x <= 0, by the hardware's exp2.

    Corrects the rounding error of x log2(e), which far from 0 is many times the error of exp2.
    """
    power = x * _LOG2_E
    error = tl.fma(x, _LOG2_E, -power) + x * _LOG2_E_REST
    # Below -128 the result is about 0, and the correction would be inf - inf = NaN for an infinite x.
    return tl.exp2(power) * (1.0 + tl.where(x > -128.0, error, 0.0) * _LN_2)


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1], accurate for small x, too: the series of 2 artanh(x / (2 + x))."""
    s = x / (2.0 + x)
    square = s * s
    series = 1.0 / 15.0
    series = series * square + 1.0 / 13.0
    series = series * square + 1.0 / 11.0
    series = series * square + 1.0 / 9.0
    series = series * square + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    return 2.0 * s * (series * square + 1.0)
