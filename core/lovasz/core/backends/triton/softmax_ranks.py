"""The sweeps that rank softmax errors on a GPU: they count errors in tables, or list pixels to be sorted next."""

import triton
import triton.language as tl

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
    GROUP_WORDS,
    HALVES_OF_TABLE,
    PLANE_FIRST_PIXEL,
    PLANE_IMAGE_PIXELS,
    PLANE_JOINT,
    SEGMENT_COLUMNS,
    SEGMENT_LARGEST,
    SEGMENT_STATE,
    TERM_COLUMNS,
)
from lovasz.core.backends.triton.planes import (
    first_elements,
    first_logits,
    group_on,
    is_counted_by,
    locate,
    read_labels,
)
from lovasz.core.backends.triton.softmax import (
    CELLS,
    SHIFT,
    SOME,
    TOP,
    if_class,
    load_class,
    load_statistics,
    probabilities_of,
)
from lovasz.core.backends.triton.sorting import list_keys, sort_keys
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


@triton.jit(do_not_specialize=["classes", "joints", "pixel_count"])
def softmax_count(
    addresses,
    planes,
    block_planes,
    rules,
    terms,
    groups,
    maps,
    words,
    segments,
    least,
    maxima,
    reciprocals,
    label_errors,
    pixel_losses,
    cross_sums,
    classes,
    joints,
    pixel_count,
    LOGIT: tl.constexpr,
    LABEL: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    RULES: tl.constexpr,
    TERMS: tl.constexpr,
    CROSS_TERMS: tl.constexpr,
    ANY_TABLE: tl.constexpr,
    ANY_ABSENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The second sweep: fills the tables, finds the largest errors of absent classes, and adds up cross-entropies."""
    address, plane, pixels, inside = locate(addresses, planes, block_planes, BLOCK)
    if ANY_TABLE:
        first = first_logits(address, first_elements(plane, pixels, classes), LOGIT)
        stride = tl.load(plane + PLANE_IMAGE_PIXELS)
        labels, counting, is_bad = read_labels(address, pixels, inside, rules, classes, LABEL, RULES)
        maximum, reciprocal, label_error, used, place = load_statistics(
            plane, pixels, inside, maxima, reciprocals, label_errors, PROBABILITIES
        )
        for t in tl.static_range(TERMS):
            term = terms + t * TERM_COLUMNS
            row, group, bin_count = group_on(plane, term, groups)
            valid = used & is_counted_by(term, counting)
            if bin_count > 0:
                tables = words + tl.load(group + GROUP_WORDS)
                cells = maps + tl.load(group + GROUP_MAP)
                for start in range(0, classes, SOME):
                    # First the loads of all classes, then all lookups, so that the latencies of each kind overlap.
                    values = ()
                    for i in tl.static_range(SOME):
                        values = values + (load_class(first, stride, start + i, classes, inside),)
                    smallest_of_classes = ()
                    for i in tl.static_range(SOME):
                        number = row * classes + tl.minimum(start + i, classes - 1)
                        smallest_of_classes = smallest_of_classes + (tl.load(least + number),)
                    bits_of_classes = ()
                    cells_of_classes = ()
                    for i in tl.static_range(SOME):
                        probabilities = probabilities_of(values[i], maximum, reciprocal, PROBABILITIES)
                        bits = bits_of(tl.where(labels == start + i, label_error, probabilities))
                        bits_of_classes = bits_of_classes + (bits,)
                        cells_of_classes = cells_of_classes + (load_cells(bits, cells, SHIFT, TOP, CELLS),)
                    for i in tl.static_range(SOME):
                        k = start + i
                        bits = bits_of_classes[i]
                        found, rests = bins_and_rests(bits, cells_of_classes[i], bin_count, SHIFT, TOP, CELLS)
                        counts = if_class(k, classes, valid) & (bits >= smallest_of_classes[i])
                        count_errors(
                            tables + k * HALVES_OF_TABLE * bin_count, found, rests, bin_count, labels == k, counts
                        )
                if ANY_ABSENT:
                    for c in range(classes):
                        segment = segments + (row * classes + c) * SEGMENT_COLUMNS
                        if tl.load(segment + SEGMENT_STATE) == ABSENT:
                            logits = load_class(first, stride, c, classes, inside)
                            bits = bits_of(probabilities_of(logits, maximum, reciprocal, PROBABILITIES))
                            keys = largest_error_key(bits, place, valid)
                            tl.atomic_max(segment + SEGMENT_LARGEST, tl.max(keys, axis=0), sem="relaxed")
    for e in tl.static_range(CROSS_TERMS):
        place = tl.load(plane + PLANE_FIRST_PIXEL).to(tl.int32) + pixels
        loss = tl.load(pixel_losses + e * tl.cast(pixel_count, tl.int64) + place, mask=inside, other=0.0).to(tl.float64)
        row = cross_sums + (e * joints + tl.load(plane + PLANE_JOINT)) * CROSS_COLUMNS
        tl.atomic_add(row + CROSS_SUM, tl.sum(in_units(loss, tl.load(row + CROSS_UNIT))), sem="relaxed")


@triton.jit(do_not_specialize=["classes"])
def softmax_collect(
    addresses,
    planes,
    block_planes,
    rules,
    terms,
    groups,
    maps,
    words,
    least,
    ranked_rows,
    maxima,
    reciprocals,
    label_errors,
    bucket_befores,
    bucket_counts,
    lists,
    classes,
    LOGIT: tl.constexpr,
    LABEL: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    RULES: tl.constexpr,
    TERMS: tl.constexpr,
    ANY_TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The third sweep: lists the pixels of each bucket, in any order; in small groups, all pixels of each segment."""
    address, plane, pixels, inside = locate(addresses, planes, block_planes, BLOCK)
    for t in tl.static_range(TERMS):
        term = terms + t * TERM_COLUMNS
        row, group, bin_count = group_on(plane, term, groups)
        if (bin_count == 0) | (tl.load(ranked_rows + row) > 0):
            labels, counting, is_bad = read_labels(address, pixels, inside, rules, classes, LABEL, RULES)
            first = first_logits(address, first_elements(plane, pixels, classes), LOGIT)
            stride = tl.load(plane + PLANE_IMAGE_PIXELS)
            maximum, reciprocal, label_error, used, place = load_statistics(
                plane, pixels, inside, maxima, reciprocals, label_errors, PROBABILITIES
            )
            valid = used & is_counted_by(term, counting)
            own_lists = lists + tl.load(group + GROUP_LIST)
            room = tl.load(group + GROUP_LIST_ROOM)
            for start in range(0, classes, SOME):
                values = ()
                for i in tl.static_range(SOME):
                    values = values + (load_class(first, stride, start + i, classes, inside),)
                bits_of_classes = ()
                for i in tl.static_range(SOME):
                    p = probabilities_of(values[i], maximum, reciprocal, PROBABILITIES)
                    bits_of_classes = bits_of_classes + (bits_of(tl.where(labels == start + i, label_error, p)),)
                if bin_count == 0:
                    in_group = place - tl.load(group + GROUP_FIRST_PIXEL).to(tl.int32)
                    for i in tl.static_range(SOME):
                        keys = tl.where(valid, sort_keys(bits_of_classes[i], labels == start + i, place), -1)
                        places = own_lists + (start + i) * room + in_group
                        tl.store(places, keys, mask=if_class(start + i, classes, inside))
                elif ANY_TABLE:
                    entries_of_classes = ()
                    counts_of_classes = ()
                    for i in tl.static_range(SOME):
                        k = start + i
                        bits = bits_of_classes[i]
                        cell = load_cells(bits, maps + tl.load(group + GROUP_MAP), SHIFT, TOP, CELLS)
                        found, rests = bins_and_rests(bits, cell, bin_count, SHIFT, TOP, CELLS)
                        table = words + tl.load(group + GROUP_WORDS) + k * HALVES_OF_TABLE * bin_count
                        number = row * classes + tl.minimum(k, classes - 1)
                        # Entries name buckets only in segments whose buckets are sorted.
                        counts = if_class(k, classes, valid) & (bits >= tl.load(least + number))
                        entries = load_entries(table, found, bin_count, labels == k, counts)
                        entries_of_classes = entries_of_classes + (entries,)
                        counts_of_classes = counts_of_classes + (counts & is_bucket(entries),)
                    for i in tl.static_range(SOME):
                        k = start + i
                        bucket = tl.load(group + GROUP_FIRST_BUCKET) + k * tl.load(group + GROUP_BUCKETS)
                        list_keys(
                            entries=entries_of_classes[i],
                            bits=bits_of_classes[i],
                            is_foreground=labels == k,
                            pixel=place,
                            bucket_befores=bucket_befores + bucket,
                            bucket_counts=bucket_counts + bucket,
                            own_list=own_lists + k * room,
                            mask=counts_of_classes[i],
                        )
