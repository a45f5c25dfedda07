"""Colours and markers that the figures share."""

OURS, USUAL, NEUTRAL = "#d1602f", "#4178a4", "#8a8a8a"
PALE = "#e6a889"
"""Variants of ours."""
GRID = "#dddddd"
MARKERS = {"fresh": "o", "half-trained": "s", "trained": "^"}
"""Of each regime of :mod:`benchmarks.workloads`."""
