"""Kernels that decide from the counts of the first sweep how softmax segments are scored, and that add up the loss."""

import triton
import triton.language as tl

from lovasz.core import computed
from lovasz.core.backends.triton.columns import (
    ABSENT,
    CROSS_COLUMNS,
    CROSS_LARGEST,
    CROSS_MEAN,
    CROSS_SUM,
    CROSS_UNIT,
    FACTOR_LABEL,
    FACTOR_SPREAD,
    FACTORS,
    GROUP_BINS,
    GROUP_BUCKETS,
    GROUP_COLUMNS,
    GROUP_COUNTERS,
    GROUP_RANKED_BELOW,
    GROUP_SHARE,
    GROUP_TERM,
    PASSED_OVER,
    SCALE_PULL,
    SCALE_SPREAD,
    SCALES,
    SCORED,
    SEGMENT_COLUMNS,
    SEGMENT_FOREGROUND,
    SEGMENT_LARGEST,
    SEGMENT_LOSS,
    SEGMENT_STATE,
    SEGMENT_UNIT,
    SEGMENT_VALID,
    SEGMENT_WEIGHT,
    SOFTMAX_COUNTERS,
    SOFTMAX_LEAST,
    TERM_COLUMNS,
    TERM_LISTS_CLASSES,
)
from lovasz.core.backends.triton.tables import NO_SIGN, power_of_two

FIXED_POINT_BITS = tl.constexpr(computed.FIXED_POINT_BITS)
"""The precision of a segment's loss: its unit is 2^-60 of a bound. The largest error is a bound, as the sum of all g is
at most 1."""

SEGMENTS_AT_ONCE = tl.constexpr(128)


@triton.jit
def buckets_to_rank(group, foreground):
    """The number of a segment's buckets that are sorted."""
    buckets = tl.load(group + GROUP_BUCKETS).to(tl.int32)
    return tl.where(foreground < tl.load(group + GROUP_RANKED_BELOW), buckets, 0)


@triton.jit
def unit_of_sum(largest, count):
    """The unit, as an exponent of 2, in which a sum of ``count`` pixel losses of at most ``largest`` fits; float64."""
    bound = (largest * count).to(tl.int64, bitcast=True)
    return tl.where(largest > 0, ((bound >> 52) & 0x7FF) - 1022 - FIXED_POINT_BITS, 0)


@triton.jit(do_not_specialize=["rows", "channels", "joints"])
def plan_softmax(
    groups,
    terms,
    counters,
    class_weights,
    class_flags,
    segments,
    least,
    ranked,
    ranked_rows,
    cross_counters,
    cross_class_weights,
    cross_factors,
    cross_sums,
    cross_scales,
    cross_sizes,
    rows,
    channels,
    joints,
    CHANNELS_PADDED: tl.constexpr,
):
    """Decides how each segment is scored, and computes the factors of cross-entropy's gradient.

    Runs one instance per group of each Lovász term, and one per joint of each cross-entropy term.

    Args:
        counters: int32, shape (SOFTMAX_COUNTERS, channels) for each group of each grouping.
        class_weights: float64, shape (terms, channels): class weight x weight of the term.
        class_flags: int64, shape (terms, channels): whether the term lists the class.
        least: int32, one per segment, written: the bits of the smallest error that is ranked, by counting or sorting.
        ranked: int32, one per segment, written: the number of its buckets that are sorted.
        ranked_rows: int32, one per group, written: the largest ``ranked`` of its segments.
        cross_counters: int64, one per cross-entropy term: where its first joint's counters begin.
        cross_class_weights: float64, shape (cross-entropy terms, channels).
        cross_factors: float64, shape (cross-entropy terms, 2): the columns of ``Factor``.
        cross_scales: float32, shape (joints, cross-entropy terms, 2), written: the columns of ``Scale``.
        cross_sizes: float64, one per joint: the number of its pixels.
    """
    program = tl.program_id(0)
    k = tl.arange(0, CHANNELS_PADDED)
    inside = k < channels
    if program < rows:
        group = groups + program * GROUP_COLUMNS
        term = tl.load(group + GROUP_TERM)
        own = counters + tl.load(group + GROUP_COUNTERS)
        foreground = tl.load(own + k, mask=inside, other=0)
        valid = tl.sum(foreground)
        is_present = foreground > 0
        is_listed = (tl.load(class_flags + term * channels + k, mask=inside, other=0) != 0) & (valid > 0)
        is_scored = tl.where(tl.load(terms + term * TERM_COLUMNS + TERM_LISTS_CLASSES) != 0, is_listed, is_present)
        scored_classes = tl.maximum(tl.sum(is_scored.to(tl.int32)), 1)
        share = tl.load(group + GROUP_SHARE).to(tl.float64, bitcast=True) / scored_classes.to(tl.float64)
        weights = tl.load(class_weights + term * channels + k, mask=inside, other=0.0) * share
        counts_errors = is_scored & is_present & (tl.load(group + GROUP_BINS) > 0)
        number = program * channels + k
        segment = segments + number.to(tl.int64) * SEGMENT_COLUMNS
        state = tl.where(is_scored, tl.where(is_present, SCORED, ABSENT), PASSED_OVER).to(tl.int64)
        tl.store(segment + SEGMENT_STATE, state, mask=inside)
        tl.store(segment + SEGMENT_UNIT, tl.zeros_like(state) - FIXED_POINT_BITS, mask=inside)
        tl.store(segment + SEGMENT_FOREGROUND, foreground.to(tl.int64), mask=inside)
        tl.store(segment + SEGMENT_VALID, tl.zeros_like(state) + valid, mask=inside)
        tl.store(segment + SEGMENT_WEIGHT, weights.to(tl.int64, bitcast=True), mask=inside)
        inverted = tl.load(own + SOFTMAX_LEAST * channels + k, mask=inside, other=0)
        # In small groups all errors are sorted. Segments that are not scored, and tables of absent classes, count none.
        is_sorted = is_scored & (tl.zeros_like(foreground) + tl.load(group + GROUP_BINS) == 0)
        smallest = tl.where(counts_errors, NO_SIGN - inverted, tl.where(is_sorted, 0, NO_SIGN))
        tl.store(least + number, smallest, mask=inside)
        buckets = tl.where(counts_errors, buckets_to_rank(group, foreground), 0)
        tl.store(ranked + number, buckets, mask=inside)
        tl.store(ranked_rows + program, tl.max(buckets, axis=0))
    else:
        entropy = (program - rows) // joints
        joint = (program - rows) - entropy * joints
        own = counters + tl.load(cross_counters + entropy) + joint * SOFTMAX_COUNTERS * channels
        counts = tl.load(own + k, mask=inside, other=0).to(tl.float64)
        total = tl.sum(counts * tl.load(cross_class_weights + entropy * channels + k, mask=inside, other=0.0))
        mean = tl.where(total > 0, 1.0 / total, 0.0)
        row = cross_sums + (program - rows) * CROSS_COLUMNS
        largest = tl.load(row + CROSS_LARGEST).to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)
        tl.store(row + CROSS_UNIT, unit_of_sum(largest, tl.load(cross_sizes + joint)))
        tl.store(row + CROSS_MEAN, mean.to(tl.int64, bitcast=True))
        scales = cross_scales + SCALES * (joint * ((tl.num_programs(0) - rows) // joints) + entropy)
        tl.store(scales + SCALE_PULL, (mean * tl.load(cross_factors + FACTORS * entropy + FACTOR_LABEL)).to(tl.float32))
        tl.store(
            scales + SCALE_SPREAD, (mean * tl.load(cross_factors + FACTORS * entropy + FACTOR_SPREAD)).to(tl.float32)
        )


@triton.jit(do_not_specialize=["channels", "segment_count", "cross_count"])
def add_up(
    groups,
    segments,
    cross_sums,
    cross_weights,
    loss_address,
    channels,
    segment_count,
    cross_count,
):
    """Adds up the loss of a batch of one joint, and writes it to an address. Runs as one instance.

    Args:
        cross_weights: float64, one per cross-entropy term.
        loss_address: int64: the address of a float32, or 0 if the loss is not wanted.
    """
    address = tl.load(loss_address)
    if address != 0:
        total = tl.zeros([SEGMENTS_AT_ONCE], tl.float64)
        for start in range(0, segment_count, SEGMENTS_AT_ONCE):
            number = start + tl.arange(0, SEGMENTS_AT_ONCE)
            inside = number < segment_count
            segment = segments + number.to(tl.int64) * SEGMENT_COLUMNS
            state = tl.load(segment + SEGMENT_STATE, mask=inside, other=PASSED_OVER)
            has_table = tl.load(groups + number // channels * GROUP_COLUMNS + GROUP_BINS, mask=inside, other=0) > 0
            largest = tl.load(segment + SEGMENT_LARGEST, mask=inside, other=0) >> 32
            largest = largest.to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)
            unit = tl.load(segment + SEGMENT_UNIT, mask=inside, other=0)
            loss = tl.load(segment + SEGMENT_LOSS, mask=inside, other=0).to(tl.float64) * power_of_two(unit)
            weight = tl.load(segment + SEGMENT_WEIGHT, mask=inside, other=0).to(tl.float64, bitcast=True)
            loss = tl.where(has_table & (state == ABSENT), largest, loss)
            total += tl.where(state != PASSED_OVER, weight * loss, 0.0)
        value = tl.sum(total)
        for entropy in range(cross_count):
            row = cross_sums + entropy * CROSS_COLUMNS
            mean = tl.load(row + CROSS_MEAN).to(tl.float64, bitcast=True)
            loss = tl.load(row + CROSS_SUM).to(tl.float64) * power_of_two(tl.load(row + CROSS_UNIT)) * mean
            value += tl.load(cross_weights + entropy) * loss
        tl.store(address.to(tl.pointer_type(tl.float32)), value.to(tl.float32))
