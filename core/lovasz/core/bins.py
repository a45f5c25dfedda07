"""The bins in which tables count errors: by the exponent and the leading mantissa bits of the error as a float32.

Bins stand in descending order of the error. The octave o = 0 is that of the segment's ``top`` exponent; octave o holds
the errors in [2^(top - o), 2^(top - o + 1)) and is cut into 2^bits(o) bins of equal width:

    bits(o) = max(MIN_BITS, MAX_BITS - o // OCTAVES_PER_BIT)

so the bins of larger errors, which weigh more in loss and gradient, are finer. What lies below the last octave shares
the last bin. The number of bins is the same for all groups, so that tables of shards add; small groups are sorted.

A table's entry is one 64-bit word, count x 2^REST_SUM_BITS + sum of rests: the rest of an error is how far it lies
below its bin's upper end, in units of 2^-REST_BITS of the bin's width, rounded down. Integers: no sum depends on any
order.
"""

from __future__ import annotations

MAX_BITS = 15
MIN_BITS = 5
OCTAVES_PER_BIT = 3
OCTAVES = 64

SORTED_BELOW_PIXELS = 1 << 18
"""Groups with fewer pixels are sorted. Near here both take as long (measured on a CPU); and in smaller groups single
pixels weigh more, so that ties within a bin would cost the gradient up to some 2e-5 of its norm."""

SORTED_BELOW_FOREGROUND = 256
"""On a CPU, classes with fewer pixels are sorted in large groups, too: each of their pixels weighs much in the
gradient, and so do those that share its bin."""

MOST_ORDER_ERROR = 1.8e-5
"""Of the norm of a hinge's gradient: where the bins of a table leave more than this uncertain, by an estimate that was
found to be at least the true error up to here (docs/mathematics.md), the segment is sorted."""

SOFTMAX_TOP = 0
"""The top exponent for probabilities: 1 is the largest, and stands alone in its octave."""

LOWEST_TOP = OCTAVES - 127
"""From here up, an error of 0 falls into the last bin."""

REST_BITS = 12
"""At most; where a bin is not 2^12 floats wide, its rests are the exact ones."""
REST_SUM_BITS = 38
MAX_PIXELS = 1 << (64 - REST_SUM_BITS)
"""Groups of more pixels than a count can hold are sorted."""


def bits_of(octave: int) -> int:
    return max(MIN_BITS, MAX_BITS - octave // OCTAVES_PER_BIT)


def first_bins() -> list[int]:
    """The first bin of each octave, and behind them that of the errors below the last octave."""
    starts = [0]
    for octave in range(OCTAVES):
        starts.append(starts[-1] + (1 << bits_of(octave)))
    return starts


BINS = first_bins()[-1] + 1
