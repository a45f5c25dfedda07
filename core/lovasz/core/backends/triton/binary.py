"""The first sweep of the hinge on a GPU, and from its counts how each segment is scored and the map of its table.

Each binary label has planes of its own.

The errors m = max(0, 1 - s x), s = +-1, have any scale, and all weigh the same. So the first sweep counts them in
cells, among which ``share_out`` divides the bins of the segment's table. There is a smallest positive error: 1 - s x is
0 or at least 2^-24.
"""

import triton
import triton.language as tl

from lovasz.core.backends.triton import bins
from lovasz.core.backends.triton.columns import (
    ABSENT,
    BAD_LABEL,
    BINARY_COUNTERS,
    BINARY_FOREGROUND,
    BINARY_LARGEST,
    BINARY_LEAST,
    BINARY_VALID,
    GROUP_BINS,
    GROUP_COLUMNS,
    GROUP_COUNTERS,
    GROUP_MAP,
    GROUP_SHARE,
    GROUP_TERM,
    GROUPING_COLUMNS,
    GROUPING_COUNTERS,
    GROUPING_PER_IMAGE,
    GROUPING_RULE,
    NOT_FINITE,
    OUTCOME_HIT,
    OUTCOMES,
    PASSED_OVER,
    PLANE_CHANNEL,
    PLANE_JOINT,
    SCORED,
    SEGMENT_COLUMNS,
    SEGMENT_FOREGROUND,
    SEGMENT_STATE,
    SEGMENT_UNIT,
    SEGMENT_VALID,
    SEGMENT_WEIGHT,
    TERM_COLUMNS,
)
from lovasz.core.backends.triton.planes import (
    add_fault,
    first_elements,
    first_logits,
    group_on,
    is_counted,
    is_counted_by,
    locate,
    of_plane,
    read_labels,
)
from lovasz.core.backends.triton.segments import (
    FIXED_POINT_BITS,
    buckets_to_rank,
)
from lovasz.core.backends.triton.tables import (
    EXPONENT_BIAS,
    MANTISSA_BITS,
    NO_SIGN,
    STOP_BITS,
    bits_of,
)

SHIFT = tl.constexpr(bins.BINARY_SHIFT)
TOP = tl.constexpr(bins.HINGE_TOP)
CELLS = tl.constexpr(bins.HINGE_CELLS)

CELLS_AT_ONCE = tl.constexpr(1024)


@triton.jit
def load_errors(address, plane, pixels, inside, channels, rules, LOGIT: tl.constexpr, LABEL, RULES: tl.constexpr):
    """(errors, logits, whether each pixel is foreground; one bit per rule for which it is valid; whether it is bad)."""
    elements = first_elements(plane, pixels, channels)
    logits = tl.load(first_logits(address, elements, LOGIT), mask=inside, other=0.0).to(tl.float32)
    labels, counting, is_bad = read_labels(address, elements, inside, rules, 2, LABEL, RULES)
    is_foreground = labels == 1
    errors = tl.maximum(tl.where(is_foreground, 1.0 - logits, 1.0 + logits), 0.0)
    return errors, logits, is_foreground, counting, is_bad


@triton.jit
def is_finite(logits, errors):
    """Whether each error is finite; a logit of minus infinity is allowed on background."""
    return (logits < float("inf")) & (errors < float("inf"))


@triton.jit(do_not_specialize=["channels"])
def binary_statistics(
    addresses,
    planes,
    block_planes,
    rules,
    groupings,
    terms,
    groups,
    counters,
    predictions,
    faults,
    cells,
    channels,
    LOGIT: tl.constexpr,
    LABEL: tl.constexpr,
    RULES: tl.constexpr,
    GROUPINGS: tl.constexpr,
    TERMS: tl.constexpr,
    ANY_TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first sweep: counts pixels, and errors in cells.

    Args:
        counters: int32, shape (BINARY_COUNTERS, channels) for each group of each grouping, 0 before.
        predictions: int32, shape (joints, 2, channels), 0 before: the pixels that are predicted as foreground, and how
            many of them are foreground.
        faults: int32, shape (joints, faults), 0 before.
        cells: int32, CELLS for each segment that has a table, 0 before.
    """
    address, plane, pixels, inside = locate(addresses, planes, block_planes, BLOCK)
    errors, logits, is_foreground, counting, is_bad = load_errors(
        address, plane, pixels, inside, channels, rules, LOGIT, LABEL, RULES
    )
    finite = is_finite(logits, errors)
    used = (counting != 0) & finite
    add_fault(faults, plane, BAD_LABEL, is_bad)
    add_fault(faults, plane, NOT_FINITE, (counting != 0) & ~finite)
    channel = tl.load(plane + PLANE_CHANNEL)
    predicted = predictions + tl.load(plane + PLANE_JOINT) * OUTCOMES * channels + channel
    is_predicted = used & (logits > 0)
    tl.atomic_add(predicted, tl.sum(is_predicted.to(tl.int32)), sem="relaxed")
    tl.atomic_add(
        predicted + OUTCOME_HIT * channels, tl.sum((is_predicted & is_foreground).to(tl.int32)), sem="relaxed"
    )
    bits = bits_of(errors)
    for g in tl.static_range(GROUPINGS):
        grouping = groupings + g * GROUPING_COLUMNS
        own = counters + tl.load(grouping + GROUPING_COUNTERS) + channel
        own += of_plane(plane, tl.load(grouping + GROUPING_PER_IMAGE)) * BINARY_COUNTERS * channels
        counted = used & is_counted(counting, tl.load(grouping + GROUPING_RULE))
        in_front = counted & is_foreground
        tl.atomic_add(own + BINARY_FOREGROUND * channels, tl.sum(in_front.to(tl.int32)), sem="relaxed")
        tl.atomic_add(own + BINARY_VALID * channels, tl.sum(counted.to(tl.int32)), sem="relaxed")
        inverted = tl.max(tl.where(in_front, NO_SIGN - bits, 0), axis=0)
        tl.atomic_max(own + BINARY_LEAST * channels, inverted, sem="relaxed")
        tl.atomic_max(own + BINARY_LARGEST * channels, tl.max(tl.where(counted, bits, 0), axis=0), sem="relaxed")
    if ANY_TABLE:
        for t in tl.static_range(TERMS):
            term = terms + t * TERM_COLUMNS
            row, group, bin_count = group_on(plane, term, groups)
            if bin_count > 0:
                own_cells = cells + tl.load(group + GROUP_MAP) + channel * CELLS
                cell = TOP - (bits >> SHIFT)
                counted = used & is_counted_by(term, counting) & (cell >= 0) & (cell < CELLS)
                tl.atomic_add(own_cells + cell, 1, mask=counted, sem="relaxed")


@triton.jit
def bins_of_cells(counts, total, bin_count, SHIFT: tl.constexpr):
    """log2 of the number of bins of each cell.

    Half of ``bin_count`` is shared out in proportion to the pixels of each cell and rounded down to a power of two, but
    a cell has at least one bin, and at most one per float.
    """
    shares = counts.to(tl.int64) * (bin_count // 2) // tl.maximum(total, 1)
    logs = (tl.maximum(shares, 1).to(tl.float32).to(tl.int32, bitcast=True) >> MANTISSA_BITS) - EXPONENT_BIAS
    return tl.minimum(logs, SHIFT)


@triton.jit(do_not_specialize=["channels"])
def plan_binary(
    groups,
    term_weights,
    counters,
    cells,
    segments,
    least,
    ranked,
    ranked_rows,
    channels,
):
    """Decides how each segment is scored, and which bins its table has. One instance per segment.

    Args:
        term_weights: float64, one per term.
        cells: int32: before, the counts of errors; after, the map of the segment's table.
        least: int32, one per segment, written: the bits of the smallest error that is ranked, by counting or sorting.
        ranked: int32, one per segment, written: the number of its buckets that are sorted.
        ranked_rows: int32, one per group, 0 before: the largest ``ranked`` of its segments.
    """
    number = tl.program_id(0)
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
        share_out(own_cells, bin_count, smallest, largest)


@triton.jit
def share_out(cells, bin_count, smallest, largest):
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
        tl.store(cells + cell, (stops << STOP_BITS) | (SHIFT - bits), mask=cell < CELLS)
        stop += tl.sum(widths)
    # No error in the cells after the last is counted, but the binary search for a bin's cell needs ascending ends.
    for start in range(last + 1, CELLS, CELLS_AT_ONCE):
        cell = start + tl.arange(0, CELLS_AT_ONCE)
        tl.store(cells + cell, tl.zeros_like(cell) + (stop << STOP_BITS), mask=cell < CELLS)
