"""The first sweep of the binary losses on a GPU, and functions that all of their sweeps share.

Each binary label has planes of its own. The *margin* z of a pixel is its logit, with the sign changed on background:
large where the logit is right. The hinge's errors are m = max(0, 1 - z), those of Lovász-Sigmoid m = sigmoid(-z).

Errors of the hinge have any scale, and all weigh the same. So the first sweep counts errors in cells, among which
``binary_segments`` divides the bins of the segment's table. The hinge has a smallest positive error: 1 - z is 0 or at
least 2^-24.
"""

import triton
import triton.language as tl

from lovasz.core.backends.triton import bins
from lovasz.core.backends.triton.columns import (
    BAD_LABEL,
    BINARY_COUNTERS,
    BINARY_FOREGROUND,
    BINARY_LARGEST,
    BINARY_LEAST,
    BINARY_VALID,
    CROSS_COLUMNS,
    CROSS_LARGEST,
    GROUP_MAP,
    GROUPING_COLUMNS,
    GROUPING_COUNTERS,
    GROUPING_PER_IMAGE,
    GROUPING_RULE,
    NOT_FINITE,
    OUTCOME_HIT,
    OUTCOMES,
    PLANE_CHANNEL,
    PLANE_JOINT,
    TERM_COLUMNS,
)
from lovasz.core.backends.triton.elementary import exponential, log1p
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
from lovasz.core.backends.triton.tables import NO_SIGN, bits_of

SHIFT = tl.constexpr(bins.BINARY_SHIFT)


@triton.jit
def load_pixels(address, plane, pixels, inside, channels, rules, LOGIT: tl.constexpr, LABEL, RULES: tl.constexpr):
    """(logits, margins, whether a pixel is foreground, one bit per rule for which it is valid, whether it is bad)."""
    elements = first_elements(plane, pixels, channels)
    logits = tl.load(first_logits(address, elements, LOGIT), mask=inside, other=0.0).to(tl.float32)
    labels, counting, is_bad = read_labels(address, elements, inside, rules, 2, LABEL, RULES)
    is_foreground = labels == 1
    return logits, tl.where(is_foreground, logits, -logits), is_foreground, counting, is_bad


@triton.jit
def is_finite(logits, margins):
    """Whether each error is finite; a logit of minus infinity is allowed on background."""
    # 1 - z is finite where z is. The hinge needs it, too, and so keeps its registers.
    return (logits < float("inf")) & (1.0 - margins < float("inf"))


@triton.jit
def sigmoids(margins):
    """(sigmoid(-|z|), sigmoid(|z|)) of margins z, at most and at least 1/2; neither is a difference."""
    power = exponential(-tl.abs(margins))
    larger = tl.div_rn(1.0, 1.0 + power)
    return power * larger, larger


@triton.jit
def sigmoid_errors(margins):
    smaller, larger = sigmoids(margins)
    return tl.where(margins >= 0, smaller, larger)


@triton.jit
def errors_of(margins, SIGMOID: tl.constexpr):
    """The errors of Lovász-Sigmoid, or of the hinge."""
    if SIGMOID:
        return sigmoid_errors(margins)
    else:
        return tl.maximum(1.0 - margins, 0.0)


@triton.jit
def cross_entropies(margins, is_foreground, pos_weight, mask):
    """The binary cross-entropy of each pixel, before the mean: float64; 0 where the mask is false.

    Args:
        pos_weight: float64: the factor on foreground.
    """
    losses = tl.maximum(-margins, 0.0) + log1p(exponential(-tl.abs(margins)))
    return tl.where(mask, losses.to(tl.float64) * tl.where(is_foreground, pos_weight, 1.0), 0.0)


@triton.jit(do_not_specialize=["channels", "joints"])
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
    cross_rules,
    pos_weights,
    cross_sums,
    channels,
    joints,
    LOGIT: tl.constexpr,
    LABEL: tl.constexpr,
    SIGMOID: tl.constexpr,
    RULES: tl.constexpr,
    GROUPINGS: tl.constexpr,
    TERMS: tl.constexpr,
    CROSS_TERMS: tl.constexpr,
    ANY_TABLE: tl.constexpr,
    TOP: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first sweep: counts pixels, and errors in cells.

    Args:
        counters: int32, shape (BINARY_COUNTERS, channels) for each group of each grouping, 0 before.
        predictions: int32, shape (joints, 2, channels), 0 before: the pixels that are predicted as foreground, and how
            many of them are foreground.
        faults: int32, shape (joints, faults), 0 before.
        cells: int32, CELLS for each segment that has a table, 0 before.
        cross_rules: int64, one per cross-entropy term.
        pos_weights: float64, shape (cross-entropy terms, channels).
    """
    address, plane, pixels, inside = locate(addresses, planes, block_planes, BLOCK)
    logits, margins, is_foreground, counting, is_bad = load_pixels(
        address, plane, pixels, inside, channels, rules, LOGIT, LABEL, RULES
    )
    errors = errors_of(margins, SIGMOID)
    finite = is_finite(logits, margins)
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
    # Before the groupings: after them, it would take up to sixteen registers more.
    for e in tl.static_range(CROSS_TERMS):
        losses = cross_entropies(
            margins=margins,
            is_foreground=is_foreground,
            pos_weight=tl.load(pos_weights + e * channels + channel),
            mask=used & is_counted(counting, tl.load(cross_rules + e)),
        )
        row = cross_sums + (e * joints + tl.load(plane + PLANE_JOINT)) * CROSS_COLUMNS
        tl.atomic_max(row + CROSS_LARGEST, tl.max(losses.to(tl.int64, bitcast=True), axis=0), sem="relaxed")
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
