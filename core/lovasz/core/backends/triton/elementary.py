"""Elementary functions on a GPU, to the accuracy of float32."""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950216293335)
"""log2(e) as a float32 ..."""
_LOG2_E_REST = tl.constexpr(1.925963033500665e-08)
"""... and what it is off by."""
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exponential(x):
    """exp(x) of x <= 0 by the hardware's exp2, with the error put right that rounding x log2(e) makes: far from 0 it
    is many times that of exp2."""
    power = x * _LOG2_E
    error = tl.fma(x, _LOG2_E, -power) + x * _LOG2_E_REST
    # Far down there is nothing to put right, and infinity minus infinity is no number.
    return tl.exp2(power) * (1.0 + tl.where(x > -128.0, error, 0.0) * _LN_2)


@triton.jit
def log1p(x):
    """log(1 + x) of x in [0, 1], with all digits however small x is: 2 artanh(x / (2 + x)) by its series."""
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
