"""The kernel that decides from the counts of the first sweep how the segments of binary losses are scored.

It also shares out the bins of each segment's table, and computes what the means of binary cross-entropies divide by.
"""

import triton
import triton.language as tl

from lovasz.core.backends.triton import bins
from lovasz.core.backends.triton.columns import (
    ABSENT,
    BINARY_COUNTERS,
    BINARY_FOREGROUND,
    BINARY_LARGEST,
    BINARY_LEAST,
    BINARY_VALID,
    CROSS_COLUMNS,
    CROSS_LARGEST,
    CROSS_MEAN,
    CROSS_UNIT,
    GROUP_BINS,
    GROUP_COLUMNS,
    GROUP_COUNTERS,
    GROUP_MAP,
    GROUP_SHARE,
    GROUP_TERM,
    PASSED_OVER,
    SCORED,
    SEGMENT_COLUMNS,
    SEGMENT_FOREGROUND,
    SEGMENT_STATE,
    SEGMENT_UNIT,
    SEGMENT_VALID,
    SEGMENT_WEIGHT,
)
from lovasz.core.backends.triton.segments import FIXED_POINT_BITS, buckets_to_rank, unit_of_sum
from lovasz.core.backends.triton.tables import EXPONENT_BIAS, MANTISSA_BITS, NO_SIGN, STOP_BITS

SHIFT = tl.constexpr(bins.BINARY_SHIFT)

CELLS_AT_ONCE = tl.constexpr(1024)
LABELS_AT_ONCE = tl.constexpr(128)


@triton.jit
def bins_of_cells(counts, total, bin_count, SHIFT: tl.constexpr):
    """log2 of the number of bins of each cell.

    Half of ``bin_count`` is shared out in proportion to the pixels of each cell and rounded down to a power of two, but
    a cell has at least one bin, and at most one per float.
    """
    shares = counts.to(tl.int64) * (bin_count // 2) // tl.maximum(total, 1)
    logs = (tl.maximum(shares, 1).to(tl.float32).to(tl.int32, bitcast=True) >> MANTISSA_BITS) - EXPONENT_BIAS
    return tl.minimum(logs, SHIFT)


@triton.jit(do_not_specialize=["channels", "joints", "segment_count"])
def plan_binary(
    groups,
    term_weights,
    counters,
    cells,
    segments,
    least,
    ranked,
    ranked_rows,
    cross_counters,
    cross_sizes,
    cross_sums,
    channels,
    joints,
    segment_count,
    CROSS_TERMS: tl.constexpr,
    TOP: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Decides how each segment is scored, and which bins its table has; prepares the sums of binary cross-entropies.

    Runs one instance per segment, and one per joint of each binary cross-entropy term.

    Args:
        term_weights: float64, one per Lovász term.
        counters: int32, shape (BINARY_COUNTERS, channels) for each group of each grouping.
        cells: int32: before, the counts of errors; after, the map of the segment's table.
        least: int32, one per segment, written: the bits of the smallest error that is ranked, by counting or sorting.
        ranked: int32, one per segment, written: the number of its buckets that are sorted.
        ranked_rows: int32, one per group, 0 before: the largest ``ranked`` of its segments.
        cross_counters: int64, one per cross-entropy term: where its first joint's counters begin.
        cross_sizes: float64, one per joint: the number of its pixels, counted once for each label.
    """
    number = tl.program_id(0)
    if number < segment_count:
        plan_segment(
            number=number,
            groups=groups,
            term_weights=term_weights,
            counters=counters,
            cells=cells,
            segments=segments,
            least=least,
            ranked=ranked,
            ranked_rows=ranked_rows,
            channels=channels,
            TOP=TOP,
            CELLS=CELLS,
        )
    elif CROSS_TERMS > 0:
        row = number - segment_count
        entropy = row // joints
        joint = row - entropy * joints
        own = counters + tl.load(cross_counters + entropy) + joint * BINARY_COUNTERS * channels
        plan_sum(
            row=cross_sums + row * CROSS_COLUMNS,
            valid_of_labels=own + BINARY_VALID * channels,
            size=tl.load(cross_sizes + joint),
            channels=channels,
        )


@triton.jit
def plan_segment(
    number,
    groups,
    term_weights,
    counters,
    cells,
    segments,
    least,
    ranked,
    ranked_rows,
    channels,
    TOP: tl.constexpr,
    CELLS: tl.constexpr,
):
    """Decides how a segment is scored, and which bins its table has."""
    row = number // channels
    channel = number - row * channels
    group = groups + row * GROUP_COLUMNS
    own = counters + tl.load(group + GROUP_COUNTERS) + channel
    foreground = tl.load(own + BINARY_FOREGROUND * channels)
    valid = tl.load(own + BINARY_VALID * channels)
    smallest = NO_SIGN - tl.load(own + BINARY_LEAST * channels)
    largest = tl.load(own + BINARY_LARGEST * channels)
    state = tl.where(valid > 0, tl.where(foreground > 0, SCORED, ABSENT), PASSED_OVER)
    weight = tl.load(term_weights + tl.load(group + GROUP_TERM)) / channels
    weight *= tl.load(group + GROUP_SHARE).to(tl.float64, bitcast=True)
    segment = segments + number.to(tl.int64) * SEGMENT_COLUMNS
    tl.store(segment + SEGMENT_STATE, state.to(tl.int64))
    unit = (largest >> MANTISSA_BITS) - (EXPONENT_BIAS - 1) - FIXED_POINT_BITS
    tl.store(segment + SEGMENT_UNIT, unit.to(tl.int64))
    tl.store(segment + SEGMENT_FOREGROUND, foreground.to(tl.int64))
    tl.store(segment + SEGMENT_VALID, valid.to(tl.int64))
    tl.store(segment + SEGMENT_WEIGHT, weight.to(tl.int64, bitcast=True))
    bin_count = tl.load(group + GROUP_BINS).to(tl.int32)
    counts_errors = (state == SCORED) & (bin_count > 0)
    # In tables errors of 0 are not counted. In small groups all errors are sorted.
    is_sorted = (state != PASSED_OVER) & (bin_count == 0)
    tl.store(least + number, tl.where(counts_errors, tl.maximum(smallest, 1), tl.where(is_sorted, 0, NO_SIGN)))
    buckets = tl.where(counts_errors, buckets_to_rank(group, foreground), 0)
    tl.store(ranked + number, buckets)
    tl.atomic_max(ranked_rows + row, buckets, sem="relaxed")
    if counts_errors:
        own_cells = cells + tl.load(group + GROUP_MAP) + channel * CELLS
        share_out(own_cells, bin_count, smallest, largest, TOP, CELLS)


@triton.jit
def plan_sum(row, valid_of_labels, size, channels):
    """Computes the unit of a joint's sum of binary cross-entropies, and the factor that makes it a mean.

    Args:
        valid_of_labels: int32, one per label: the number of its valid pixels.
        size: float64: the number of pixels, void ones, too, counted once for each label.
    """
    valid = tl.zeros([LABELS_AT_ONCE], tl.int64)
    for start in range(0, channels, LABELS_AT_ONCE):
        label = start + tl.arange(0, LABELS_AT_ONCE)
        valid += tl.load(valid_of_labels + label, mask=label < channels, other=0)
    count = tl.sum(valid).to(tl.float64)
    mean = tl.where(count > 0, 1.0 / tl.maximum(count, 1.0), 0.0)
    largest = tl.load(row + CROSS_LARGEST).to(tl.float64, bitcast=True)
    tl.store(row + CROSS_UNIT, unit_of_sum(largest, size))
    tl.store(row + CROSS_MEAN, mean.to(tl.int64, bitcast=True))


@triton.jit
def share_out(cells, bin_count, smallest, largest, TOP: tl.constexpr, CELLS: tl.constexpr):
    """Turns a segment's counts into its map. Cells from the largest error to the smallest foreground error get bins."""
    first = tl.maximum(TOP - (largest >> SHIFT), 0)
    last = tl.minimum(TOP - (smallest >> SHIFT), CELLS - 1)
    total = tl.zeros([CELLS_AT_ONCE], tl.int32)
    for start in range(first, last + 1, CELLS_AT_ONCE):
        cell = start + tl.arange(0, CELLS_AT_ONCE)
        total += tl.load(cells + cell, mask=cell <= last, other=0)
    pixels = tl.sum(total)
    stop = 0
    for start in range(first, last + 1, CELLS_AT_ONCE):
        cell = start + tl.arange(0, CELLS_AT_ONCE)
        counts = tl.load(cells + cell, mask=cell <= last, other=0)
        bits = bins_of_cells(counts, pixels, bin_count, SHIFT)
        widths = tl.where(counts > 0, 1 << bits, 0)
        stops = stop + tl.cumsum(widths, 0)
        tl.store(cells + cell, (stops << STOP_BITS) | (SHIFT - bits), mask=cell <= last)
        stop += tl.sum(widths)
    # No error in the cells after the last is counted, but the binary search for a bin's cell needs ascending ends.
    for start in range(last + 1, CELLS, CELLS_AT_ONCE):
        cell = start + tl.arange(0, CELLS_AT_ONCE)
        tl.store(cells + cell, tl.zeros_like(cell) + (stop << STOP_BITS), mask=cell < CELLS)
