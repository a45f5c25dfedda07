"""The sweeps over softmax logits on a GPU: statistics, counting, collecting, the way back.

A thread has a pixel (a few, with few classes) and goes over its classes, CLASSES of them unrolled: all of them where
they fit into registers (ALL_CLASSES), else in several rounds, which read the logits again from the caches. The first
sweep keeps the maximum, the reciprocal of the sum and the label's error of each pixel, 12 bytes, so that the others
find a probability with one exponential. No result leaves its thread but as an integer.

Launches switch the fusion of multiplications and additions off, so that all sweeps round alike, and each finds an error
in the bin in which another one counted it.
"""

import triton
import triton.language as tl

from lovasz.core.triton_kernels import bins
from lovasz.core.triton_kernels.columns import (
    ABSENT,
    ADDRESS_GRAD,
    BAD_LABELS,
    CROSS_COLUMNS,
    CROSS_LARGEST,
    CROSS_SUM,
    CROSS_UNIT,
    GROUP_BINS,
    GROUP_BUCKETS,
    GROUP_COLUMNS,
    GROUP_FIRST_BUCKET,
    GROUP_FIRST_PIXEL,
    GROUP_LIST,
    GROUP_LIST_ROOM,
    GROUP_MAP,
    GROUP_WORDS,
    GROUPING_COLUMNS,
    GROUPING_COUNTERS,
    GROUPING_PER_IMAGE,
    GROUPING_RULE,
    NOT_FINITE,
    OUT_OF_RANGE,
    PLANE_FIRST_PIXEL,
    PLANE_IMAGE_PIXELS,
    PLANE_JOINT,
    SEGMENT_COLUMNS,
    SEGMENT_LARGEST,
    SEGMENT_STATE,
    SEGMENT_WEIGHT,
    TERM_COLUMNS,
    TERM_RULE,
)
from lovasz.core.triton_kernels.elementary import exponential, log1p
from lovasz.core.triton_kernels.planes import (
    add_fault,
    first_elements,
    first_logits,
    is_counted,
    locate,
    of_plane,
    read_labels,
    row_of,
)
from lovasz.core.triton_kernels.sorting import list_keys, sort_keys
from lovasz.core.triton_kernels.tables import (
    NO_SIGN,
    bins_and_rests,
    bits_of,
    count_errors,
    gradient_of,
    in_units,
    is_bucket,
    is_largest,
    largest_error_key,
    load_cells,
    load_entries,
)

SHIFT = tl.constexpr(bins.SOFTMAX_SHIFT)
TOP = tl.constexpr(bins.SOFTMAX_TOP)
CELLS = tl.constexpr(bins.SOFTMAX_CELLS)

SOME = tl.constexpr(4)
"""Classes whose loads and look-ups are under way at once. More would take registers from other warps."""
UNUSED = tl.constexpr(-2.0)
"""The label's error of a pixel that has no part in anything: others' are at least -1, of probabilities above 1."""


@triton.jit
def if_class(k, classes, mask):
    """The mask, false behind the last class."""
    return mask & (tl.full(mask.shape, k, tl.int32) < classes)


@triton.jit
def load_class(first, stride, k, classes, inside):
    """The pixels' logits of class k as float32; minus infinity behind the last class."""
    values = tl.load(first + k * stride, mask=if_class(k, classes, inside), other=0.0).to(tl.float32)
    return tl.where(tl.full(inside.shape, k, tl.int32) < classes, values, -float("inf"))


@triton.jit
def add_counts(counters, numbers, flags, CLASSES_PADDED: tl.constexpr):
    """Adds to the counter of each class how many of the pixels with true flags have its number."""
    counts = tl.histogram(tl.where(flags, numbers, 0), CLASSES_PADDED, mask=flags)
    places = counters + tl.arange(0, CLASSES_PADDED)
    tl.atomic_add(places, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def keep_least(counters, bits, labels, flags):
    """Raises the inverted bits of the smallest error of each pixel's class. Most pixels find a smaller one there."""
    inverted = NO_SIGN - bits
    known = tl.load(counters + labels, mask=flags, other=0)
    tl.atomic_max(counters + labels, inverted, mask=flags & (inverted > known), sem="relaxed")


@triton.jit
def pixel_cross_entropy(
    total, others, maximum, label_logits, label_weights, smoothing, weights_sum, weighted_logits, classes
):
    """A cross-entropy term's loss at each pixel, before the mean.

    Args:
        weighted_logits: the sum over the classes of class weight x (logit - maximum).
    """
    label_exponential = exponential(label_logits - maximum)
    log_total = tl.log(total)
    # Near p = 1, log1p keeps the digits that the difference loses.
    likely = label_exponential > others
    ratio = tl.where(likely, others / label_exponential, 0.0)
    negative_log = tl.where(likely, log1p(ratio), log_total - (label_logits - maximum))
    loss = (1.0 - smoothing) * (negative_log * label_weights)
    smoothed = smoothing / classes * (weights_sum * log_total - weighted_logits)
    return tl.minimum(tl.maximum(loss + tl.where(smoothing > 0, smoothed, 0.0), 0.0), 3e38)


@triton.jit(do_not_specialize=["classes", "pixel_count", "tolerance"])
def softmax_statistics(
    addresses,
    planes,
    block_planes,
    rules,
    groupings,
    counters,
    predictions,
    faults,
    maxima,
    reciprocals,
    label_errors,
    cross_rules,
    cross_class_weights,
    cross_smoothings,
    cross_sums,
    pixel_losses,
    classes,
    joints,
    pixel_count,
    tolerance,
    LOGIT: tl.constexpr,
    LABEL: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    RULES: tl.constexpr,
    GROUPINGS: tl.constexpr,
    CROSS_TERMS: tl.constexpr,
    CLASSES: tl.constexpr,
    ALL_CLASSES: tl.constexpr,
    CLASSES_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first sweep: keeps each pixel's statistics, and counts.

    Args:
        counters: int32, 0 before: of each group of each grouping, its pixels of each class, then the inverted bits of
            their smallest errors.
        predictions: int32, shape (joints, 2, classes), 0 before: pixels of each prediction, and how many are right.
        faults: int32, shape (joints, faults), 0 before.
        maxima: float32, one a pixel, a result, as ``reciprocals`` and ``label_errors`` (UNUSED for void pixels).
        cross_class_weights: float64, shape (cross-entropy terms, classes).
        cross_smoothings: float64, one a cross-entropy term.
        pixel_losses: float32, shape (cross-entropy terms, pixel_count), a result.
        tolerance: by how much a probability may lie outside [0, 1].
    """
    address, plane, pixels, inside = locate(addresses, planes, block_planes, BLOCK)
    first = first_logits(address, first_elements(plane, pixels, classes), LOGIT)
    stride = tl.load(plane + PLANE_IMAGE_PIXELS)
    labels, counting, is_bad = read_labels(address, pixels, inside, rules, classes, LABEL, RULES)

    maximum = tl.full([BLOCK], -float("inf"), tl.float32)
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    prediction = tl.zeros_like(labels)
    finite = inside
    if ALL_CLASSES:
        values = ()
        for k in tl.static_range(CLASSES):
            value = load_class(first, stride, k, classes, inside)
            values = values + (value,)
            maximum, lowest, prediction, finite = see_class(maximum, lowest, prediction, finite, value, k, classes)
        total = tl.zeros_like(maximum)
        others = tl.zeros_like(maximum)
        if not PROBABILITIES:
            for k in tl.static_range(CLASSES):
                part = exponential(values[k] - maximum)
                total += part
                others += tl.where(labels == k, 0.0, part)
    else:
        for start in range(0, classes, CLASSES):
            for i in tl.static_range(CLASSES):
                k = start + i
                value = load_class(first, stride, k, classes, inside)
                maximum, lowest, prediction, finite = see_class(maximum, lowest, prediction, finite, value, k, classes)
        # Over hundreds of classes float32 would lose digits.
        total_64 = tl.zeros_like(maximum).to(tl.float64)
        others_64 = tl.zeros_like(total_64)
        if not PROBABILITIES:
            for start in range(0, classes, CLASSES):
                for i in tl.static_range(CLASSES):
                    part = exponential(load_class(first, stride, start + i, classes, inside) - maximum).to(tl.float64)
                    total_64 += part
                    others_64 += tl.where(labels == start + i, 0.0, part)
        total = total_64.to(tl.float32)
        others = others_64.to(tl.float32)

    if PROBABILITIES:
        label_error = 1.0 - tl.load(first + labels * stride, mask=inside, other=0.0).to(tl.float32)
    else:
        reciprocal = tl.div_rn(1.0, total)
        label_error = others * reciprocal
    # A pixel that is not finite is in no table: what is said of its joint has no meaning.
    used = (counting != 0) & finite
    place = tl.load(plane + PLANE_FIRST_PIXEL).to(tl.int32) + pixels
    tl.store(label_errors + place, tl.where(used, label_error, UNUSED), mask=inside)
    if not PROBABILITIES:
        tl.store(maxima + place, maximum, mask=inside)
        tl.store(reciprocals + place, reciprocal, mask=inside)

    add_fault(faults, plane, BAD_LABELS, is_bad)
    add_fault(faults, plane, NOT_FINITE, (counting != 0) & ~finite)
    if PROBABILITIES:
        add_fault(faults, plane, OUT_OF_RANGE, used & ((lowest < -tolerance) | (maximum > 1.0 + tolerance)))
    joint = tl.load(plane + PLANE_JOINT)
    predicted = predictions + joint * 2 * classes
    add_counts(predicted, prediction, used, CLASSES_PADDED)
    add_counts(predicted + classes, prediction, used & (prediction == labels), CLASSES_PADDED)
    label_bits = bits_of(label_error)
    for g in tl.static_range(GROUPINGS):
        grouping = groupings + g * GROUPING_COLUMNS
        own = counters + tl.load(grouping + GROUPING_COUNTERS)
        own += of_plane(plane, tl.load(grouping + GROUPING_PER_IMAGE)) * 2 * classes
        counted = used & is_counted(counting, tl.load(grouping + GROUPING_RULE))
        add_counts(own, labels, counted, CLASSES_PADDED)
        keep_least(own + classes, label_bits, labels, counted)

    for e in tl.static_range(CROSS_TERMS):
        label_logits = tl.load(first + labels * stride, mask=inside, other=0.0).to(tl.float32)
        own_weights = cross_class_weights + e * classes
        smoothing = tl.load(cross_smoothings + e).to(tl.float32)
        weights_sum = 0.0
        weighted_logits = tl.zeros_like(maximum)
        if smoothing > 0:
            for c in range(classes):
                weight = tl.load(own_weights + c).to(tl.float32)
                weights_sum += weight
                weighted_logits += weight * (load_class(first, stride, c, classes, inside) - maximum)
        loss = pixel_cross_entropy(
            total=total,
            others=others,
            maximum=maximum,
            label_logits=label_logits,
            label_weights=tl.load(own_weights + labels).to(tl.float32),
            smoothing=smoothing,
            weights_sum=weights_sum,
            weighted_logits=weighted_logits,
            classes=classes,
        )
        loss = tl.where(used & is_counted(counting, tl.load(cross_rules + e)), loss, 0.0)
        tl.store(pixel_losses + e * pixel_count + place, loss, mask=inside)
        row = cross_sums + (e * joints + joint) * CROSS_COLUMNS
        tl.atomic_max(row + CROSS_LARGEST, tl.max(bits_of(loss), axis=0).to(tl.int64), sem="relaxed")


@triton.jit
def see_class(maximum, lowest, prediction, finite, value, k, classes):
    """(largest value, smallest, the first of the largest, whether all are finite), now with those of class k."""
    is_class = tl.full(maximum.shape, k, tl.int32) < classes
    is_larger = value > maximum
    prediction = tl.where(is_larger, k, prediction)
    maximum = tl.where(is_larger, value, maximum)
    lowest = tl.where(is_class, tl.minimum(lowest, value), lowest)
    return maximum, lowest, prediction, finite & ((tl.abs(value) < float("inf")) | ~is_class)


@triton.jit
def load_statistics(plane, pixels, inside, maxima, reciprocals, label_errors, PROBABILITIES: tl.constexpr):
    """(maximum, reciprocal of the sum, label's error, whether the pixel is used, its number in the batch)."""
    place = tl.load(plane + PLANE_FIRST_PIXEL).to(tl.int32) + pixels
    label_error = tl.load(label_errors + place, mask=inside, other=UNUSED)
    maximum = label_error
    reciprocal = label_error
    if not PROBABILITIES:
        maximum = tl.load(maxima + place, mask=inside, other=0.0)
        reciprocal = tl.load(reciprocals + place, mask=inside, other=0.0)
    return maximum, reciprocal, label_error, label_error > UNUSED, place


@triton.jit
def probabilities_of(logits, maximum, reciprocal, PROBABILITIES: tl.constexpr):
    """The probabilities of a class."""
    if PROBABILITIES:
        return logits
    else:
        return exponential(logits - maximum) * reciprocal


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
    """The second sweep: fills the tables, finds the largest errors of absent classes, adds cross-entropies up."""
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
            row = row_of(plane, term)
            group = groups + row * GROUP_COLUMNS
            valid = used & is_counted(counting, tl.load(term + TERM_RULE))
            bin_count = tl.load(group + GROUP_BINS).to(tl.int32)
            if bin_count > 0:
                tables = words + tl.load(group + GROUP_WORDS)
                cells = maps + tl.load(group + GROUP_MAP)
                for start in range(0, classes, SOME):
                    # Loads of all classes first, then all look-ups, so that each waits for the first one only.
                    values = ()
                    for i in tl.static_range(SOME):
                        values = values + (load_class(first, stride, start + i, classes, inside),)
                    smallest_of_classes = ()
                    for i in tl.static_range(SOME):
                        number = row * classes + tl.minimum(start + i, classes - 1)
                        smallest_of_classes = smallest_of_classes + (tl.load(least + number),)
                    bits_of_classes = ()
                    entries_of_classes = ()
                    for i in tl.static_range(SOME):
                        probabilities = probabilities_of(values[i], maximum, reciprocal, PROBABILITIES)
                        bits = bits_of(tl.where(labels == start + i, label_error, probabilities))
                        bits_of_classes = bits_of_classes + (bits,)
                        entries_of_classes = entries_of_classes + (load_cells(bits, cells, SHIFT, TOP, CELLS),)
                    for i in tl.static_range(SOME):
                        k = start + i
                        bits = bits_of_classes[i]
                        found, rests = bins_and_rests(bits, entries_of_classes[i], bin_count, SHIFT, TOP, CELLS)
                        counts = if_class(k, classes, valid) & (bits >= smallest_of_classes[i])
                        count_errors(tables + k * 2 * bin_count, found, rests, bin_count, labels == k, counts)
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
        loss = tl.load(pixel_losses + e * pixel_count + place, mask=inside, other=0.0).to(tl.float64)
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
    """The third sweep, where pixels are ranked: lists those of each bucket, in any order; of small groups, all."""
    address, plane, pixels, inside = locate(addresses, planes, block_planes, BLOCK)
    for t in tl.static_range(TERMS):
        term = terms + t * TERM_COLUMNS
        row = row_of(plane, term)
        group = groups + row * GROUP_COLUMNS
        bin_count = tl.load(group + GROUP_BINS).to(tl.int32)
        if (bin_count == 0) | (tl.load(ranked_rows + row) > 0):
            labels, counting, is_bad = read_labels(address, pixels, inside, rules, classes, LABEL, RULES)
            first = first_logits(address, first_elements(plane, pixels, classes), LOGIT)
            stride = tl.load(plane + PLANE_IMAGE_PIXELS)
            maximum, reciprocal, label_error, used, place = load_statistics(
                plane, pixels, inside, maxima, reciprocals, label_errors, PROBABILITIES
            )
            valid = used & is_counted(counting, tl.load(term + TERM_RULE))
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
                        table = words + tl.load(group + GROUP_WORDS) + k * 2 * bin_count
                        number = row * classes + tl.minimum(k, classes - 1)
                        # No segment that is not ranked has an entry that names a bucket.
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


@triton.jit
def gradients_of_classes(
    start,
    first,
    stride,
    classes,
    inside,
    labels,
    maximum,
    reciprocal,
    label_error,
    place,
    valid_of_terms,
    row_of_terms,
    bins_of_terms,
    cells_of_terms,
    tables_of_terms,
    sorted_of_terms,
    segments,
    least,
    PROBABILITIES: tl.constexpr,
    TERMS: tl.constexpr,
    ANY_TABLE: tl.constexpr,
    ANY_ABSENT: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """(probabilities, weight x g summed over the terms) of CLASSES classes from ``start`` on, each a tuple.

    Loads of all classes come first, then all look-ups of a kind, so that each waits for the first one only.

    Args:
        sorted_of_terms: where the g of what was sorted stand, for class 0.
    """
    values = ()
    for i in tl.static_range(CLASSES):
        values = values + (load_class(first, stride, start + i, classes, inside),)
    probabilities = ()
    bits_of_classes = ()
    gradients = ()
    for i in tl.static_range(CLASSES):
        p = probabilities_of(values[i], maximum, reciprocal, PROBABILITIES)
        probabilities = probabilities + (p,)
        bits_of_classes = bits_of_classes + (bits_of(tl.where(labels == start + i, label_error, p)),)
        gradients = gradients + (tl.zeros_like(maximum),)
    for t in tl.static_range(TERMS):
        bin_count = bins_of_terms[t]
        entries_of_classes = ()
        rests_of_classes = ()
        counts_of_classes = ()
        for i in tl.static_range(CLASSES):
            number = row_of_terms[t] * classes + tl.minimum(start + i, classes - 1)
            counts = bits_of_classes[i] >= tl.load(least + number)
            counts_of_classes = counts_of_classes + (if_class(start + i, classes, valid_of_terms[t]) & counts,)
        if ANY_TABLE:
            cells_of_classes = ()
            for i in tl.static_range(CLASSES):
                cell = load_cells(bits_of_classes[i], cells_of_terms[t], SHIFT, TOP, CELLS)
                cells_of_classes = cells_of_classes + (cell,)
            for i in tl.static_range(CLASSES):
                k = start + i
                bits = bits_of_classes[i]
                found, rests = bins_and_rests(bits, cells_of_classes[i], bin_count, SHIFT, TOP, CELLS)
                in_table = counts_of_classes[i] & (tl.zeros_like(labels) + bin_count > 0)
                table = tables_of_terms[t] + k * 2 * bin_count
                entries_of_classes = entries_of_classes + (
                    load_entries(table, found, bin_count, labels == k, in_table),
                )
                rests_of_classes = rests_of_classes + (rests,)
        sorted_of_classes = ()
        for i in tl.static_range(CLASSES):
            k = start + i
            is_sorted = counts_of_classes[i] & (tl.zeros_like(labels) + bin_count == 0)
            if ANY_TABLE:
                is_sorted |= is_bucket(entries_of_classes[i])
            own = tl.load(sorted_of_terms[t] + k * stride, mask=is_sorted, other=0.0)
            sorted_of_classes = sorted_of_classes + (own,)
        summed = ()
        for i in tl.static_range(CLASSES):
            g = gradients[i] + sorted_of_classes[i]
            if ANY_TABLE:
                in_table = gradient_of(entries_of_classes[i], rests_of_classes[i])
                g += tl.where(is_bucket(entries_of_classes[i]), 0.0, in_table)
            if ANY_ABSENT and ANY_TABLE:
                segment = row_of_terms[t] * classes + tl.minimum(start + i, classes - 1)
                segment = segments + segment * SEGMENT_COLUMNS
                weight = tl.load(segment + SEGMENT_WEIGHT).to(tl.float64, bitcast=True).to(tl.float32)
                is_winner = is_largest(tl.load(segment + SEGMENT_LARGEST), place)
                g += tl.where(if_class(start + i, classes, valid_of_terms[t]) & is_winner, weight, 0.0)
            summed = summed + (g,)
        gradients = summed
    return probabilities, gradients


@triton.jit(do_not_specialize=["classes", "element_count"])
def softmax_backward(
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
    cross_rules,
    cross_class_weights,
    cross_scales,
    more_grads,
    classes,
    element_count,
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
    """The last sweep: each pixel's g of each class, and the way back through softmax.

    With h_k = dloss/dp_k = g_k, and -g_y on the label's class y: dloss/dz_k = p_k (h_k - sum_j p_j h_j). On the label's
    class, 1 - p_y is the sum of the others, so nothing cancels (docs/mathematics.md).

    Args:
        words: scanned, entries in their place.
        more_grads: float32, shape (terms - 1, element_count).
    """
    address, plane, pixels, inside = locate(addresses, planes, block_planes, BLOCK)
    elements = first_elements(plane, pixels, classes)
    first = first_logits(address, elements, LOGIT)
    grads = tl.load(address + ADDRESS_GRAD).to(tl.pointer_type(tl.float32)) + elements
    stride = tl.load(plane + PLANE_IMAGE_PIXELS)
    labels, counting, is_bad = read_labels(address, pixels, inside, rules, classes, LABEL, RULES)
    maximum, reciprocal, label_error, used, place = load_statistics(
        plane, pixels, inside, maxima, reciprocals, label_errors, PROBABILITIES
    )
    more = more_grads + tl.load(plane + PLANE_FIRST_PIXEL) * classes + elements
    valid_of_terms = ()
    row_of_terms = ()
    bins_of_terms = ()
    cells_of_terms = ()
    tables_of_terms = ()
    sorted_of_terms = ()
    for t in tl.static_range(TERMS):
        term = terms + t * TERM_COLUMNS
        row = row_of(plane, term)
        group = groups + row * GROUP_COLUMNS
        valid_of_terms = valid_of_terms + (used & is_counted(counting, tl.load(term + TERM_RULE)),)
        row_of_terms = row_of_terms + (row,)
        bins_of_terms = bins_of_terms + (tl.load(group + GROUP_BINS).to(tl.int32),)
        cells_of_terms = cells_of_terms + (maps + tl.load(group + GROUP_MAP),)
        tables_of_terms = tables_of_terms + (words + tl.load(group + GROUP_WORDS),)
        if t == 0:
            sorted_of_terms = sorted_of_terms + (grads,)
        else:
            sorted_of_terms = sorted_of_terms + (more + (t - 1) * element_count,)
    label_g = tl.zeros_like(maximum)
    label_p = tl.zeros_like(maximum)
    others_pg_64 = tl.zeros_like(maximum).to(tl.float64)
    for start in range(0, classes, SOME):
        some_p, some_g = gradients_of_classes(
            start=start,
            first=first,
            stride=stride,
            classes=classes,
            inside=inside,
            labels=labels,
            maximum=maximum,
            reciprocal=reciprocal,
            label_error=label_error,
            place=place,
            valid_of_terms=valid_of_terms,
            row_of_terms=row_of_terms,
            bins_of_terms=bins_of_terms,
            cells_of_terms=cells_of_terms,
            tables_of_terms=tables_of_terms,
            sorted_of_terms=sorted_of_terms,
            segments=segments,
            least=least,
            PROBABILITIES=PROBABILITIES,
            TERMS=TERMS,
            ANY_TABLE=ANY_TABLE,
            ANY_ABSENT=ANY_ABSENT,
            CLASSES=SOME,
        )
        for i in tl.static_range(SOME):
            is_label = labels == start + i
            label_g += tl.where(is_label, some_g[i], 0.0)
            label_p += tl.where(is_label, some_p[i], 0.0)
            others_pg_64 += tl.where(is_label, 0.0, some_p[i] * some_g[i]).to(tl.float64)
            # Kept in the gradient's place, by the thread that comes for it below.
            places = grads + (start + i) * stride
            tl.store(places, some_g[i], mask=if_class(start + i, classes, inside))
    others_pg = others_pg_64.to(tl.float32)

    shift = label_p * label_g - others_pg
    label_grad = -label_p * (label_g * label_error + others_pg)
    scales = cross_scales + tl.load(plane + PLANE_JOINT) * (2 * CROSS_TERMS)
    for e in tl.static_range(CROSS_TERMS):
        pull = tl.load(scales + 2 * e) * tl.load(cross_class_weights + e * classes + labels).to(tl.float32)
        pull = tl.where(is_counted(counting, tl.load(cross_rules + e)), pull, 0.0)
        shift += pull
        label_grad -= pull * label_error
    for start in range(0, classes, SOME):
        values = ()
        gradients = ()
        for i in tl.static_range(SOME):
            values = values + (load_class(first, stride, start + i, classes, inside),)
            g = tl.load(grads + (start + i) * stride, mask=if_class(start + i, classes, inside), other=0.0)
            gradients = gradients + (g,)
        for i in tl.static_range(SOME):
            k = start + i
            g = gradients[i]
            p = probabilities_of(values[i], maximum, reciprocal, PROBABILITIES)
            grad = tl.where(labels == k, label_grad, p * (g + shift))
            if PROBABILITIES:
                grad = tl.where(labels == k, -g, g)
            tl.store(grads + k * stride, tl.where(used, grad, 0.0), mask=if_class(k, classes, inside))
    for e in tl.static_range(CROSS_TERMS):
        spread = tl.load(scales + 2 * e + 1)
        if spread != 0:
            own_weights = cross_class_weights + e * classes
            weights_sum = 0.0
            for c in range(classes):
                weights_sum += tl.load(own_weights + c).to(tl.float32)
            counted = used & is_counted(counting, tl.load(cross_rules + e))
            for c in range(classes):
                p = probabilities_of(load_class(first, stride, c, classes, inside), maximum, reciprocal, PROBABILITIES)
                grad = tl.load(grads + c * stride, mask=inside, other=0.0)
                grad += spread * (p * weights_sum - tl.load(own_weights + c).to(tl.float32))
                tl.store(grads + c * stride, grad, mask=counted)
