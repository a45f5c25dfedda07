"""The word that counts the errors of one bin of a table, the same on CPU and GPU.

A word is a 64-bit integer: pixels x 2^REST_SUM_BITS + the sum of their rests. The rest of an error is its distance from
the upper end of its bin, in units of 2^-REST_BITS of the bin's width, rounded down. Words of several tables can be
added, and no sum depends on the order. ``backends/numba/bins.py`` and ``backends/triton/bins.py`` define the bins.
"""

from __future__ import annotations

REST_BITS = 12
"""The bits of a rest, at most. In a bin of fewer than 2^12 floats the unit is the distance between two floats."""

REST_SUM_BITS = 38

MAX_PIXELS = 1 << (64 - REST_SUM_BITS)
"""Groups with this many pixels or more have no tables, as a word could overflow."""
