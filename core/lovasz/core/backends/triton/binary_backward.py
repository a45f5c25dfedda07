"""The last sweep of the binary losses on a GPU: the gradient with respect to the logits."""

import triton
import triton.language as tl

from lovasz.core.backends.triton.binary import SHIFT, errors_of, is_finite, load_pixels, sigmoid_errors, sigmoids
from lovasz.core.backends.triton.columns import (
    ADDRESS_GRAD,
    CROSS_COLUMNS,
    CROSS_MEAN,
    GROUP_MAP,
    GROUP_WORDS,
    HALVES_OF_TABLE,
    PLANE_CHANNEL,
    PLANE_FIRST_PIXEL,
    PLANE_JOINT,
    SEGMENT_COLUMNS,
    SEGMENT_LARGEST,
    SEGMENT_WEIGHT,
    TERM_COLUMNS,
)
from lovasz.core.backends.triton.planes import (
    first_elements,
    group_on,
    is_counted,
    is_counted_by,
    locate,
)
from lovasz.core.backends.triton.tables import (
    bins_and_rests,
    bits_of,
    gradient_of,
    is_bucket,
    is_largest,
    load_cells,
    load_entries,
)


@triton.jit(do_not_specialize=["channels", "element_count", "joints"])
def binary_backward(
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
    cross_rules,
    cross_weights,
    pos_weights,
    cross_sums,
    channels,
    element_count,
    joints,
    LOGIT: tl.constexpr,
    LABEL: tl.constexpr,
    SIGMOID: tl.constexpr,
    RULES: tl.constexpr,
    TERMS: tl.constexpr,
    CROSS_TERMS: tl.constexpr,
    ANY_TABLE: tl.constexpr,
    TOP: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The last sweep: looks up each pixel's g, adds up the terms, and writes the gradient.

    Args:
        words: int64: the entries that the scan has written.
        more_grads: float32, shape (terms - 1, element_count): the g of sorted pixels, for the terms after the first.
            Those of the first term are in the gradient's memory.
        cross_weights: float64, one per cross-entropy term.
        pos_weights: float64, shape (cross-entropy terms, channels).
    """
    address, plane, pixels, inside = locate(addresses, planes, block_planes, BLOCK)
    logits, margins, is_foreground, counting, is_bad = load_pixels(
        address, plane, pixels, inside, channels, rules, LOGIT, LABEL, RULES
    )
    errors = errors_of(margins, SIGMOID)
    bits = bits_of(errors)
    place = tl.load(plane + PLANE_FIRST_PIXEL).to(tl.int32) + pixels
    grads = tl.load(address + ADDRESS_GRAD).to(tl.pointer_type(tl.float32)) + first_elements(plane, pixels, channels)
    channel = tl.load(plane + PLANE_CHANNEL)
    g = tl.zeros([BLOCK], tl.float32)
    for t in tl.static_range(TERMS):
        term = terms + t * TERM_COLUMNS
        valid = is_finite(logits, margins) & is_counted_by(term, counting)
        row, group, bin_count = group_on(plane, term, groups)
        number = row * channels + channel
        counted = valid & (bits >= tl.load(least + number))
        is_sorted = counted & (tl.zeros_like(bits) + bin_count == 0)
        if ANY_TABLE:
            own_cells = cells + tl.load(group + GROUP_MAP) + channel * CELLS
            found, rests = bins_and_rests(
                bits, load_cells(bits, own_cells, SHIFT, TOP, CELLS), bin_count, SHIFT, TOP, CELLS
            )
            table = words + tl.load(group + GROUP_WORDS) + channel * HALVES_OF_TABLE * bin_count
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
    # The gradient is exactly 0 on void pixels, whatever their logits, and where the hinge's relu is 0.
    if SIGMOID:
        smaller, larger = sigmoids(margins)
        pull = tl.where(counting != 0, g * (smaller * larger), 0.0)
    else:
        pull = tl.where(errors > 0, g, 0.0)
    for e in tl.static_range(CROSS_TERMS):
        row = cross_sums + (e * joints + tl.load(plane + PLANE_JOINT)) * CROSS_COLUMNS
        factor = tl.load(cross_weights + e) * tl.load(row + CROSS_MEAN).to(tl.float64, bitcast=True)
        pos_factor = factor * tl.load(pos_weights + e * channels + channel)
        part = sigmoid_errors(margins) * tl.where(is_foreground, pos_factor.to(tl.float32), factor.to(tl.float32))
        pull += tl.where(is_counted(counting, tl.load(cross_rules + e)), part, 0.0)
    tl.store(grads, tl.where(is_foreground, 0.0 - pull, pull), mask=inside)
