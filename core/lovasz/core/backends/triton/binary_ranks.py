"""The sweeps that rank errors of binary losses on a GPU: they count errors in tables, or list pixels to be sorted."""

import triton
import triton.language as tl

from lovasz.core.backends.triton.binary import SHIFT, cross_entropies, errors_of, is_finite, load_pixels
from lovasz.core.backends.triton.columns import (
    ABSENT,
    CROSS_COLUMNS,
    CROSS_SUM,
    CROSS_UNIT,
    GROUP_BUCKETS,
    GROUP_FIRST_BUCKET,
    GROUP_FIRST_PIXEL,
    GROUP_LIST,
    GROUP_LIST_ROOM,
    GROUP_MAP,
    GROUP_PIXEL_STEP,
    GROUP_WORDS,
    HALVES_OF_TABLE,
    PLANE_CHANNEL,
    PLANE_FIRST_PIXEL,
    PLANE_JOINT,
    SEGMENT_COLUMNS,
    SEGMENT_LARGEST,
    SEGMENT_STATE,
    TERM_COLUMNS,
)
from lovasz.core.backends.triton.planes import (
    group_on,
    is_counted,
    is_counted_by,
    locate,
)
from lovasz.core.backends.triton.sorting import (
    list_keys,
    sort_keys,
)
from lovasz.core.backends.triton.tables import (
    bins_and_rests,
    bits_of,
    count_errors,
    in_units,
    is_bucket,
    largest_error_key,
    load_cells,
    load_entries,
)


@triton.jit(do_not_specialize=["channels", "joints"])
def binary_count(
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
    cross_rules,
    pos_weights,
    cross_sums,
    channels,
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
    """The second sweep: fills the tables, and adds up cross-entropies.

    Also finds the largest error of each segment without foreground.
    """
    address, plane, pixels, inside = locate(addresses, planes, block_planes, BLOCK)
    logits, margins, is_foreground, counting, is_bad = load_pixels(
        address, plane, pixels, inside, channels, rules, LOGIT, LABEL, RULES
    )
    finite = is_finite(logits, margins)
    bits = bits_of(errors_of(margins, SIGMOID))
    place = tl.load(plane + PLANE_FIRST_PIXEL).to(tl.int32) + pixels
    channel = tl.load(plane + PLANE_CHANNEL)
    # Before the Lovász terms: after them, it would take up to thirty registers more.
    for e in tl.static_range(CROSS_TERMS):
        losses = cross_entropies(
            margins=margins,
            is_foreground=is_foreground,
            pos_weight=tl.load(pos_weights + e * channels + channel),
            mask=finite & is_counted(counting, tl.load(cross_rules + e)),
        )
        row = cross_sums + (e * joints + tl.load(plane + PLANE_JOINT)) * CROSS_COLUMNS
        tl.atomic_add(row + CROSS_SUM, tl.sum(in_units(losses, tl.load(row + CROSS_UNIT))), sem="relaxed")
    if ANY_TABLE:
        for t in tl.static_range(TERMS):
            term = terms + t * TERM_COLUMNS
            valid = finite & is_counted_by(term, counting)
            row, group, bin_count = group_on(plane, term, groups)
            number = row * channels + channel
            segment = segments + number * SEGMENT_COLUMNS
            if bin_count > 0:
                own_cells = cells + tl.load(group + GROUP_MAP) + channel * CELLS
                counted = valid & (bits >= tl.load(least + number))
                found, rests = bins_and_rests(
                    bits, load_cells(bits, own_cells, SHIFT, TOP, CELLS), bin_count, SHIFT, TOP, CELLS
                )
                table = words + tl.load(group + GROUP_WORDS) + channel * HALVES_OF_TABLE * bin_count
                count_errors(table, found, rests, bin_count, is_foreground, counted)
                if tl.load(segment + SEGMENT_STATE) == ABSENT:
                    keys = largest_error_key(bits, place, valid)
                    tl.atomic_max(segment + SEGMENT_LARGEST, tl.max(keys, axis=0), sem="relaxed")


@triton.jit(do_not_specialize=["channels"])
def binary_collect(
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
    SIGMOID: tl.constexpr,
    RULES: tl.constexpr,
    TERMS: tl.constexpr,
    ANY_TABLE: tl.constexpr,
    TOP: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The third sweep: lists the pixels of each bucket, in any order; in small groups, all pixels of each segment."""
    address, plane, pixels, inside = locate(addresses, planes, block_planes, BLOCK)
    channel = tl.load(plane + PLANE_CHANNEL)
    for t in tl.static_range(TERMS):
        term = terms + t * TERM_COLUMNS
        row, group, bin_count = group_on(plane, term, groups)
        number = row * channels + channel
        if (bin_count == 0) | (tl.load(ranked + number) > 0):
            logits, margins, is_foreground, counting, is_bad = load_pixels(
                address, plane, pixels, inside, channels, rules, LOGIT, LABEL, RULES
            )
            bits = bits_of(errors_of(margins, SIGMOID))
            place = tl.load(plane + PLANE_FIRST_PIXEL).to(tl.int32) + pixels
            valid = inside & is_finite(logits, margins) & is_counted_by(term, counting)
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
                table = words + tl.load(group + GROUP_WORDS) + channel * HALVES_OF_TABLE * bin_count
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
