"""The word in which a table counts the errors of one bin, on CPU and GPU.

A word is an integer of 64 bits: pixels x 2^REST_SUM_BITS + the sum of their rests. The rest of an error is its distance
from its bin's upper end, in units of 2^-REST_BITS of the bin's width, rounded down. Words of several tables add, and no
sum depends on an order. Where the bins lie: ``backends/numba/bins.py`` and ``backends/triton/bins.py``.
"""

from __future__ import annotations

REST_BITS = 12
"""At most; where a bin is narrower than 2^12 floats, its rests count floats."""

REST_SUM_BITS = 38

MAX_PIXELS = 1 << (64 - REST_SUM_BITS)
"""Groups of as many pixels or more do not fit a word; they are sorted."""
