"""The last sweep of softmax on a GPU: looks up the gradients of errors, and runs the backward pass through softmax."""

import triton
import triton.language as tl

from lovasz.core.backends.triton.columns import (
    ADDRESS_GRAD,
    GROUP_MAP,
    GROUP_WORDS,
    HALVES_OF_TABLE,
    PLANE_FIRST_PIXEL,
    PLANE_IMAGE_PIXELS,
    PLANE_JOINT,
    SCALE_PULL,
    SCALE_SPREAD,
    SCALES,
    SEGMENT_COLUMNS,
    SEGMENT_LARGEST,
    SEGMENT_WEIGHT,
    TERM_COLUMNS,
)
from lovasz.core.backends.triton.planes import (
    first_elements,
    first_logits,
    group_on,
    is_counted,
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
from lovasz.core.backends.triton.tables import (
    bins_and_rests,
    bits_of,
    gradient_of,
    is_bucket,
    is_largest,
    load_cells,
    load_entries,
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
    """Looks up the gradients of CLASSES classes from ``start`` on.

    First come the loads of all classes, then all lookups of each kind, so that the latencies of each kind overlap.

    Args:
        sorted_of_terms: for each term, where the g of sorted pixels are, for class 0.

    Returns:
        (probabilities, weight x g summed over the terms), each a tuple with one element per class.
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
                table = tables_of_terms[t] + k * HALVES_OF_TABLE * bin_count
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
    """The last sweep: looks up each pixel's g for each class, and runs the backward pass through softmax.

    Let h_k = dloss/dp_k, which is -g_y for the label's class y and g_k for the others; then
    dloss/dz_k = p_k (h_k - sum_j p_j h_j). For the label's class, 1 - p_y was computed as the sum of the other
    probabilities, so nothing cancels (docs/mathematics.md, section 8).

    Args:
        words: int64: the entries that the scan has written.
        more_grads: float32, shape (terms - 1, element_count): the g of sorted pixels, for the terms after the first.
            Those of the first term are in the gradient's memory.
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
        row, group, bin_count = group_on(plane, term, groups)
        valid_of_terms = valid_of_terms + (used & is_counted_by(term, counting),)
        row_of_terms = row_of_terms + (row,)
        bins_of_terms = bins_of_terms + (bin_count,)
        cells_of_terms = cells_of_terms + (maps + tl.load(group + GROUP_MAP),)
        tables_of_terms = tables_of_terms + (words + tl.load(group + GROUP_WORDS),)
        if t == 0:
            sorted_of_terms = sorted_of_terms + (grads,)
        else:
            sorted_of_terms = sorted_of_terms + (more + (t - 1) * tl.cast(element_count, tl.int64),)
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
            # Kept in the gradient's memory, from which the same thread reads it below.
            places = grads + (start + i) * stride
            tl.store(places, some_g[i], mask=if_class(start + i, classes, inside))
    others_pg = others_pg_64.to(tl.float32)

    shift = label_p * label_g - others_pg
    label_grad = -label_p * (label_g * label_error + others_pg)
    scales = cross_scales + tl.load(plane + PLANE_JOINT) * (SCALES * CROSS_TERMS)
    for e in tl.static_range(CROSS_TERMS):
        pull = tl.load(scales + SCALES * e + SCALE_PULL) * tl.load(cross_class_weights + e * classes + labels).to(
            tl.float32
        )
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
        spread = tl.load(scales + SCALES * e + SCALE_SPREAD)
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
