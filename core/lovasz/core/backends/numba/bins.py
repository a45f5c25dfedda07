"""The bins of the CPU's tables: the exponent and the leading mantissa bits of an error, as a float32, give its bin.

Bins are in descending order of the error. ``top`` is the exponent of the segment's first octave, o = 0. Octave o holds
the errors in [2^(top - o), 2^(top - o + 1)) and is divided into 2^bits(o) bins of equal width:

    bits(o) = max(MIN_BITS, MAX_BITS - o // OCTAVES_PER_BIT)

So the bins of larger errors, which weigh more in loss and gradient, are narrower relative to the error. All errors
below the last octave share the last bin. The number of bins is the same for all groups, so tables of parts of a group
can be added.
"""

from __future__ import annotations

import numpy as np

MAX_BITS = 15
MIN_BITS = 5
OCTAVES_PER_BIT = 3
OCTAVES = 61

FINE_TOP = 0
"""The top exponent for probabilities: the largest is 1, the only one in its octave."""

SOFTMAX_COARSER, BINARY_COARSER = 3 * OCTAVES_PER_BIT, 2 * OCTAVES_PER_BIT
"""A top exponent higher by these gives each octave an eighth or a quarter of the bins. Fewer bins are faster, and
the pixels whose order matters most are sorted (``scanning.window``). Errors of an untrained binary problem are close
together: an eighth would not be enough."""

HIGHEST_TOP = 127
"""The exponent of the largest float."""

LOWEST_TOP = OCTAVES - 127
"""The lowest top exponent for which an error of 0 falls into the last bin."""


def bits_of(octave: int) -> int:
    """log2 of the number of bins of an octave."""
    return max(MIN_BITS, MAX_BITS - octave // OCTAVES_PER_BIT)


def first_bins() -> list[int]:
    """The first bin of each octave; the last element is the bin of the errors below the last octave."""
    starts = [0]
    for octave in range(OCTAVES):
        starts.append(starts[-1] + (1 << bits_of(octave)))
    return starts


BINS = first_bins()[-1] + 1

SPANS = OCTAVES + 1
"""The octaves, and the last bin in place of those below."""

FIRST_BINS = np.array([*first_bins(), BINS], np.int64)
"""The bins of span i are [FIRST_BINS[i], FIRST_BINS[i + 1])."""
