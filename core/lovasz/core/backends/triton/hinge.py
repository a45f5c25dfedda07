"""The sweeps over the hinge's logits on a GPU: one logit a pixel, each binary label in planes of its own.

The errors m = max(0, 1 - s x), s = +-1, have any scale, and each weighs alike. So the first sweep counts them in coarse
cells, among which ``share_out`` divides the bins of the segment's table. They have a smallest one, though: 1 - s x is 0
or at least 2^-24.
"""

import triton
import triton.language as tl

from lovasz.core.backends.triton import bins
from lovasz.core.backends.triton.columns import (
    ABSENT,
    ADDRESS_GRAD,
    BAD_LABELS,
    GROUP_BINS,
    GROUP_BUCKETS,
    GROUP_COLUMNS,
    GROUP_COUNTERS,
    GROUP_FIRST_BUCKET,
    GROUP_FIRST_PIXEL,
    GROUP_LIST,
    GROUP_LIST_ROOM,
    GROUP_MAP,
    GROUP_PIXEL_STEP,
    GROUP_SHARE,
    GROUP_TERM,
    GROUP_WORDS,
    GROUPING_COLUMNS,
    GROUPING_COUNTERS,
    GROUPING_PER_IMAGE,
    GROUPING_RULE,
    NOT_FINITE,
    PASSED_OVER,
    PLANE_CHANNEL,
    PLANE_FIRST_PIXEL,
    PLANE_JOINT,
    SCORED,
    SEGMENT_COLUMNS,
    SEGMENT_FOREGROUND,
    SEGMENT_LARGEST,
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
from lovasz.core.backends.triton.segments import FIXED_POINT_BITS, buckets_to_rank
from lovasz.core.backends.triton.sorting import list_keys, sort_keys
from lovasz.core.backends.triton.tables import (
    EXPONENT_BIAS,
    MANTISSA_BITS,
    NO_SIGN,
    STOP_BITS,
    bins_and_rests,
    bits_of,
    count_errors,
    gradient_of,
    is_bucket,
    is_largest,
    largest_error_key,
    load_cells,
    load_entries,
)

SHIFT = tl.constexpr(bins.HINGE_SHIFT)
TOP = tl.constexpr(bins.HINGE_TOP)
CELLS = tl.constexpr(bins.HINGE_CELLS)

FOREGROUND = tl.constexpr(0)
"""Counters of each group, one a channel: its foreground pixels, ..."""
VALID = tl.constexpr(1)
"""... all of its pixels, ..."""
INVERTED_LEAST = tl.constexpr(2)
"""... the inverted bits of the smallest foreground error, ..."""
LARGEST = tl.constexpr(3)
"""... and the bits of the largest error."""
COUNTERS = tl.constexpr(4)

CELLS_AT_ONCE = tl.constexpr(1024)


@triton.jit
def load_errors(address, plane, pixels, inside, channels, rules, LOGIT: tl.constexpr, LABEL, RULES: tl.constexpr):
    """(errors, logits, whether each pixel is foreground, a bit a rule that counts it, whether its label is invalid)."""
    elements = first_elements(plane, pixels, channels)
    logits = tl.load(first_logits(address, elements, LOGIT), mask=inside, other=0.0).to(tl.float32)
    labels, counting, is_bad = read_labels(address, elements, inside, rules, 2, LABEL, RULES)
    is_foreground = labels == 1
    errors = tl.maximum(tl.where(is_foreground, 1.0 - logits, 1.0 + logits), 0.0)
    return errors, logits, is_foreground, counting, is_bad


@triton.jit
def is_finite(logits, errors):
    return (tl.abs(logits) < float("inf")) & (errors < float("inf"))


@triton.jit(do_not_specialize=["channels"])
def hinge_statistics(
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
        counters: int32, shape (COUNTERS, channels) for each group of each grouping, 0 before.
        predictions: int32, shape (joints, 2, channels), 0 before: pixels that are predicted foreground, and those
            among them that are.
        faults: int32, shape (joints, faults), 0 before.
        cells: int32, CELLS for each segment that has a table, 0 before.
    """
    address, plane, pixels, inside = locate(addresses, planes, block_planes, BLOCK)
    errors, logits, is_foreground, counting, is_bad = load_errors(
        address, plane, pixels, inside, channels, rules, LOGIT, LABEL, RULES
    )
    finite = tl.abs(logits) < float("inf")
    used = (counting != 0) & finite
    add_fault(faults, plane, BAD_LABELS, is_bad)
    add_fault(faults, plane, NOT_FINITE, (counting != 0) & ~finite)
    channel = tl.load(plane + PLANE_CHANNEL)
    predicted = predictions + tl.load(plane + PLANE_JOINT) * 2 * channels + channel
    is_predicted = used & (logits > 0)
    tl.atomic_add(predicted, tl.sum(is_predicted.to(tl.int32)), sem="relaxed")
    tl.atomic_add(predicted + channels, tl.sum((is_predicted & is_foreground).to(tl.int32)), sem="relaxed")
    bits = bits_of(errors)
    for g in tl.static_range(GROUPINGS):
        grouping = groupings + g * GROUPING_COLUMNS
        own = counters + tl.load(grouping + GROUPING_COUNTERS) + channel
        own += of_plane(plane, tl.load(grouping + GROUPING_PER_IMAGE)) * COUNTERS * channels
        counted = used & is_counted(counting, tl.load(grouping + GROUPING_RULE))
        in_front = counted & is_foreground
        tl.atomic_add(own + FOREGROUND * channels, tl.sum(in_front.to(tl.int32)), sem="relaxed")
        tl.atomic_add(own + VALID * channels, tl.sum(counted.to(tl.int32)), sem="relaxed")
        inverted = tl.max(tl.where(in_front, NO_SIGN - bits, 0), axis=0)
        tl.atomic_max(own + INVERTED_LEAST * channels, inverted, sem="relaxed")
        tl.atomic_max(own + LARGEST * channels, tl.max(tl.where(counted, bits, 0), axis=0), sem="relaxed")
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
    """log2 of the bins of each cell: in proportion to its pixels, so that all take at most half of ``bin_count``, and
    at least one; no more than a cell has floats."""
    shares = counts.to(tl.int64) * (bin_count // 2) // tl.maximum(total, 1)
    logs = (tl.maximum(shares, 1).to(tl.float32).to(tl.int32, bitcast=True) >> MANTISSA_BITS) - EXPONENT_BIAS
    return tl.minimum(logs, SHIFT)


@triton.jit(do_not_specialize=["channels"])
def plan_hinge(
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
    """One program a segment: what becomes of it, and which bins its table has.

    Args:
        term_weights: float64, one a term.
        cells: counts before, the map after.
        least: int32, one a segment, a result: the bits of the smallest error that takes part.
        ranked: int32, one a segment, a result: how many of its buckets are sorted; ``ranked_rows`` is not 0 where any.
    """
    number = tl.program_id(0)
    row = number // channels
    channel = number - row * channels
    group = groups + row * GROUP_COLUMNS
    own = counters + tl.load(group + GROUP_COUNTERS) + channel
    foreground = tl.load(own + FOREGROUND * channels)
    valid = tl.load(own + VALID * channels)
    smallest = NO_SIGN - tl.load(own + INVERTED_LEAST * channels)
    largest = tl.load(own + LARGEST * channels)
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
    # Errors of 0 take part in nothing; what is sorted whole has no least error.
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
    """Turns a segment's counts into its map: the cells from its largest error to its smallest of foreground."""
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
    # Behind the last cell no error is counted; the search for a bin's cell wants them in order all the same.
    for start in range(last + 1, CELLS, CELLS_AT_ONCE):
        cell = start + tl.arange(0, CELLS_AT_ONCE)
        tl.store(cells + cell, tl.zeros_like(cell) + (stop << STOP_BITS), mask=cell < CELLS)


@triton.jit(do_not_specialize=["channels"])
def hinge_count(
    addresses,
    planes,
    block_planes,
    rules,
    terms,
    groups,
    cells,
    words,
    segments,
    least,
    channels,
    LOGIT: tl.constexpr,
    LABEL: tl.constexpr,
    RULES: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The second sweep: fills the tables, and finds the largest errors of segments without foreground."""
    address, plane, pixels, inside = locate(addresses, planes, block_planes, BLOCK)
    errors, logits, is_foreground, counting, is_bad = load_errors(
        address, plane, pixels, inside, channels, rules, LOGIT, LABEL, RULES
    )
    bits = bits_of(errors)
    place = tl.load(plane + PLANE_FIRST_PIXEL).to(tl.int32) + pixels
    channel = tl.load(plane + PLANE_CHANNEL)
    for t in tl.static_range(TERMS):
        term = terms + t * TERM_COLUMNS
        valid = (tl.abs(logits) < float("inf")) & is_counted_by(term, counting)
        row, group, bin_count = group_on(plane, term, groups)
        number = row * channels + channel
        segment = segments + number * SEGMENT_COLUMNS
        if bin_count > 0:
            own_cells = cells + tl.load(group + GROUP_MAP) + channel * CELLS
            counted = valid & (bits >= tl.load(least + number))
            found, rests = bins_and_rests(
                bits, load_cells(bits, own_cells, SHIFT, TOP, CELLS), bin_count, SHIFT, TOP, CELLS
            )
            table = words + tl.load(group + GROUP_WORDS) + channel * 2 * bin_count
            count_errors(table, found, rests, bin_count, is_foreground, counted)
            if tl.load(segment + SEGMENT_STATE) == ABSENT:
                keys = largest_error_key(bits, place, valid)
                tl.atomic_max(segment + SEGMENT_LARGEST, tl.max(keys, axis=0), sem="relaxed")


@triton.jit(do_not_specialize=["channels"])
def hinge_collect(
    addresses,
    planes,
    block_planes,
    rules,
    terms,
    groups,
    cells,
    words,
    least,
    ranked,
    bucket_befores,
    bucket_counts,
    lists,
    channels,
    LOGIT: tl.constexpr,
    LABEL: tl.constexpr,
    RULES: tl.constexpr,
    TERMS: tl.constexpr,
    ANY_TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The third sweep, where pixels are ranked: lists those of each bucket, in any order; of small groups, all."""
    address, plane, pixels, inside = locate(addresses, planes, block_planes, BLOCK)
    channel = tl.load(plane + PLANE_CHANNEL)
    for t in tl.static_range(TERMS):
        term = terms + t * TERM_COLUMNS
        row, group, bin_count = group_on(plane, term, groups)
        number = row * channels + channel
        if (bin_count == 0) | (tl.load(ranked + number) > 0):
            errors, logits, is_foreground, counting, is_bad = load_errors(
                address, plane, pixels, inside, channels, rules, LOGIT, LABEL, RULES
            )
            bits = bits_of(errors)
            place = tl.load(plane + PLANE_FIRST_PIXEL).to(tl.int32) + pixels
            valid = inside & (tl.abs(logits) < float("inf")) & is_counted_by(term, counting)
            own_list = lists + tl.load(group + GROUP_LIST) + channel * tl.load(group + GROUP_LIST_ROOM)
            if bin_count == 0:
                first = tl.load(group + GROUP_FIRST_PIXEL) + channel * tl.load(group + GROUP_PIXEL_STEP)
                keys = tl.where(valid, sort_keys(bits, is_foreground, place), -1)
                tl.store(own_list + (place - first), keys, mask=inside)
            elif ANY_TABLE:
                own_cells = cells + tl.load(group + GROUP_MAP) + channel * CELLS
                counted = valid & (bits >= tl.load(least + number))
                cell = load_cells(bits, own_cells, SHIFT, TOP, CELLS)
                found, rests = bins_and_rests(bits, cell, bin_count, SHIFT, TOP, CELLS)
                table = words + tl.load(group + GROUP_WORDS) + channel * 2 * bin_count
                entries = load_entries(table, found, bin_count, is_foreground, counted)
                bucket = tl.load(group + GROUP_FIRST_BUCKET) + channel * tl.load(group + GROUP_BUCKETS)
                list_keys(
                    entries=entries,
                    bits=bits,
                    is_foreground=is_foreground,
                    pixel=place,
                    bucket_befores=bucket_befores + bucket,
                    bucket_counts=bucket_counts + bucket,
                    own_list=own_list,
                    mask=counted & is_bucket(entries),
                )


@triton.jit(do_not_specialize=["channels", "element_count"])
def hinge_backward(
    addresses,
    planes,
    block_planes,
    rules,
    terms,
    groups,
    cells,
    words,
    segments,
    least,
    more_grads,
    channels,
    element_count,
    LOGIT: tl.constexpr,
    LABEL: tl.constexpr,
    RULES: tl.constexpr,
    TERMS: tl.constexpr,
    ANY_TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The last sweep: each pixel's g.

    Args:
        words: scanned, entries in their place.
        more_grads: float32, shape (terms - 1, element_count): the g of what was sorted, of the terms after the first.
    """
    address, plane, pixels, inside = locate(addresses, planes, block_planes, BLOCK)
    errors, logits, is_foreground, counting, is_bad = load_errors(
        address, plane, pixels, inside, channels, rules, LOGIT, LABEL, RULES
    )
    bits = bits_of(errors)
    place = tl.load(plane + PLANE_FIRST_PIXEL).to(tl.int32) + pixels
    grads = tl.load(address + ADDRESS_GRAD).to(tl.pointer_type(tl.float32)) + first_elements(plane, pixels, channels)
    channel = tl.load(plane + PLANE_CHANNEL)
    g = tl.zeros([BLOCK], tl.float32)
    for t in tl.static_range(TERMS):
        term = terms + t * TERM_COLUMNS
        valid = (tl.abs(logits) < float("inf")) & is_counted_by(term, counting)
        row, group, bin_count = group_on(plane, term, groups)
        number = row * channels + channel
        counted = valid & (bits >= tl.load(least + number))
        is_sorted = counted & (tl.zeros_like(bits) + bin_count == 0)
        if ANY_TABLE:
            own_cells = cells + tl.load(group + GROUP_MAP) + channel * CELLS
            found, rests = bins_and_rests(
                bits, load_cells(bits, own_cells, SHIFT, TOP, CELLS), bin_count, SHIFT, TOP, CELLS
            )
            table = words + tl.load(group + GROUP_WORDS) + channel * 2 * bin_count
            in_table = counted & (tl.zeros_like(bits) + bin_count > 0)
            entries = load_entries(table, found, bin_count, is_foreground, in_table)
            is_sorted |= is_bucket(entries)
            g += tl.where(is_sorted, 0.0, gradient_of(entries, rests))
            segment = segments + number * SEGMENT_COLUMNS
            weight = tl.load(segment + SEGMENT_WEIGHT).to(tl.float64, bitcast=True).to(tl.float32)
            g += tl.where(valid & is_largest(tl.load(segment + SEGMENT_LARGEST), place), weight, 0.0)
        if t == 0:
            g += tl.load(grads, mask=is_sorted, other=0.0)
        else:
            g += tl.load(more_grads + (t - 1) * tl.cast(element_count, tl.int64) + place, mask=is_sorted, other=0.0)
    # Where relu cuts off, and on void pixels, the gradient is exactly 0.
    grad = tl.where(errors > 0, tl.where(is_foreground, -g, g), 0.0)
    tl.store(grads, grad, mask=inside)
