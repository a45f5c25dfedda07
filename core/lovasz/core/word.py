"""The word that counts the errors of one bin of a table, the same on CPU and GPU.

A word is a 64-bit integer: pixels x 2^REST_SUM_BITS + the sum of their rests. The rest of an error is its distance from
the upper end of its bin, in units of 2^-REST_BITS of the bin's width, rounded down. Words of several tables can be
added, and no sum depends on the order. ``backends/numba/bins.py`` and ``backends/triton/bins.py`` define the bins.
"""

from __future__ import annotations

REST_BITS = 12
"""At most this many bits. On a GPU, bins of fewer floats use the distance between two floats as the unit."""

REST_SUM_BITS = 38

MAX_PIXELS = 1 << (64 - REST_SUM_BITS)
"""A group of this many pixels or more would overflow a word: it is sorted instead."""
