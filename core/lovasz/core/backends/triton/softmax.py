"""The first sweep of softmax on a GPU, the statistics of each pixel, and functions that all sweeps share.

A thread has a pixel and loops over its classes, CLASSES of them unrolled: all, if they fit in registers (ALL_CLASSES);
otherwise in several rounds, which read the logits again from the caches. The first sweep stores the maximum, the
reciprocal of the sum and the label's error of each pixel, 12 bytes, so that the other sweeps compute a probability with
one exponential. Threads combine results only as integers.

Launches turn the fusion of multiplications and additions off. So all sweeps round in the same way, and each finds an
error in the bin in which another sweep has counted it.
"""

import triton
import triton.language as tl

from lovasz.core.backends.triton import bins
from lovasz.core.backends.triton.columns import (
    BAD_LABEL,
    CROSS_COLUMNS,
    CROSS_LARGEST,
    GROUPING_COLUMNS,
    GROUPING_COUNTERS,
    GROUPING_PER_IMAGE,
    GROUPING_RULE,
    NOT_FINITE,
    OUT_OF_RANGE,
    OUTCOME_HIT,
    OUTCOMES,
    PLANE_FIRST_PIXEL,
    PLANE_IMAGE_PIXELS,
    PLANE_JOINT,
    SOFTMAX_COUNTERS,
    SOFTMAX_LEAST,
)
from lovasz.core.backends.triton.elementary import exponential, log1p
from lovasz.core.backends.triton.planes import (
    add_fault,
    first_elements,
    first_logits,
    is_counted,
    locate,
    of_plane,
    read_labels,
)
from lovasz.core.backends.triton.tables import NO_SIGN, bits_of

SHIFT = tl.constexpr(bins.SOFTMAX_SHIFT)
TOP = tl.constexpr(bins.SOFTMAX_TOP)
CELLS = tl.constexpr(bins.SOFTMAX_CELLS)

SOME = tl.constexpr(4)
"""The number of classes whose loads and lookups are in flight at once. More would take registers from other warps."""
UNUSED = tl.constexpr(-2.0)
"""The label's error of pixels that no sweep uses. Others are at least -1, also for probabilities above 1."""


@triton.jit
def if_class(k, classes, mask):
    """The mask if class k exists; false after the last class."""
    return mask & (tl.full(mask.shape, k, tl.int32) < classes)


@triton.jit
def load_class(first, stride, k, classes, inside):
    """The pixels' logits of class k as float32; minus infinity after the last class."""
    values = tl.load(first + k * stride, mask=if_class(k, classes, inside), other=0.0).to(tl.float32)
    return tl.where(tl.full(inside.shape, k, tl.int32) < classes, values, -float("inf"))


@triton.jit
def add_counts(counters, numbers, flags, CLASSES_PADDED: tl.constexpr):
    """Adds to the counter of each class the number of pixels with that class number and a true flag."""
    counts = tl.histogram(tl.where(flags, numbers, 0), CLASSES_PADDED, mask=flags)
    places = counters + tl.arange(0, CLASSES_PADDED)
    tl.atomic_add(places, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def keep_least(counters, bits, labels, flags):
    """Updates the smallest error of each class, stored as inverted bits, which the atomic operation can only raise.

    Reads it first, as most pixels find a smaller error there and need no atomic operation.
    """
    inverted = NO_SIGN - bits
    known = tl.load(counters + labels, mask=flags, other=0)
    tl.atomic_max(counters + labels, inverted, mask=flags & (inverted > known), sem="relaxed")


@triton.jit
def pixel_cross_entropy(
    total, others, maximum, label_logits, label_weights, smoothing, weights_sum, weighted_logits, classes
):
    """The loss of a cross-entropy term at each pixel, before the mean.

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
    """The first sweep: stores each pixel's statistics, and counts pixels.

    Args:
        counters: int32, shape (SOFTMAX_COUNTERS, classes) for each group of each grouping, 0 before.
        predictions: int32, shape (joints, 2, classes), 0 before: the pixels predicted as each class, and how many of
            them belong to it.
        faults: int32, shape (joints, faults), 0 before.
        maxima, reciprocals, label_errors: float32, one per pixel, written; the label's error of void pixels is UNUSED.
        cross_class_weights: float64, shape (cross-entropy terms, classes).
        cross_smoothings: float64, one per cross-entropy term.
        pixel_losses: float32, shape (cross-entropy terms, pixel_count), written.
        tolerance: how far a probability may lie outside [0, 1].
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
        # Sums over hundreds of classes would lose digits in float32.
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
    if PROBABILITIES:
        finite &= lowest > -float("inf")
    elif tl.min(lowest, axis=0) == -float("inf"):
        # Minus infinity masks a class, but not the label's, and none that label smoothing gives a part of the target.
        finite &= tl.load(first + labels * stride, mask=inside, other=0.0).to(tl.float32) > -float("inf")
        for e in tl.static_range(CROSS_TERMS):
            smooths = tl.load(cross_smoothings + e) > 0
            is_masked = (lowest == -float("inf")) & is_counted(counting, tl.load(cross_rules + e))
            finite &= ~(is_masked & (tl.zeros_like(labels) + smooths.to(tl.int32) > 0))
    # Pixels that are not finite are not used: the values of a joint with a fault are undefined.
    used = (counting != 0) & finite
    place = tl.load(plane + PLANE_FIRST_PIXEL).to(tl.int32) + pixels
    tl.store(label_errors + place, tl.where(used, label_error, UNUSED), mask=inside)
    if not PROBABILITIES:
        tl.store(maxima + place, maximum, mask=inside)
        tl.store(reciprocals + place, reciprocal, mask=inside)

    add_fault(faults, plane, BAD_LABEL, is_bad)
    add_fault(faults, plane, NOT_FINITE, (counting != 0) & ~finite)
    if PROBABILITIES:
        add_fault(faults, plane, OUT_OF_RANGE, used & ((lowest < -tolerance) | (maximum > 1.0 + tolerance)))
    joint = tl.load(plane + PLANE_JOINT)
    predicted = predictions + joint * OUTCOMES * classes
    add_counts(predicted, prediction, used, CLASSES_PADDED)
    add_counts(predicted + OUTCOME_HIT * classes, prediction, used & (prediction == labels), CLASSES_PADDED)
    label_bits = bits_of(label_error)
    for g in tl.static_range(GROUPINGS):
        grouping = groupings + g * GROUPING_COLUMNS
        own = counters + tl.load(grouping + GROUPING_COUNTERS)
        own += of_plane(plane, tl.load(grouping + GROUPING_PER_IMAGE)) * SOFTMAX_COUNTERS * classes
        counted = used & is_counted(counting, tl.load(grouping + GROUPING_RULE))
        add_counts(own, labels, counted, CLASSES_PADDED)
        keep_least(own + SOFTMAX_LEAST * classes, label_bits, labels, counted)

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
        tl.store(pixel_losses + e * tl.cast(pixel_count, tl.int64) + place, loss, mask=inside)
        row = cross_sums + (e * joints + joint) * CROSS_COLUMNS
        tl.atomic_max(row + CROSS_LARGEST, tl.max(bits_of(loss), axis=0).to(tl.int64), sem="relaxed")


@triton.jit
def see_class(maximum, lowest, prediction, finite, value, k, classes):
    """Updates (largest value, smallest value, first class with the largest, whether all are < inf) with class k."""
    is_class = tl.full(maximum.shape, k, tl.int32) < classes
    is_larger = value > maximum
    prediction = tl.where(is_larger, k, prediction)
    maximum = tl.where(is_larger, value, maximum)
    lowest = tl.where(is_class, tl.minimum(lowest, value), lowest)
    return maximum, lowest, prediction, finite & (value < float("inf"))


@triton.jit
def load_statistics(plane, pixels, inside, maxima, reciprocals, label_errors, PROBABILITIES: tl.constexpr):
    """Per pixel: (maximum, reciprocal of the sum, label's error, whether it is used, its number in the batch)."""
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
    """The pixels' probabilities of a class, from its logits and the statistics."""
    if PROBABILITIES:
        return logits
    else:
        return exponential(logits - maximum) * reciprocal
