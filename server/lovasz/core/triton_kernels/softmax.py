"""The two sweeps over softmax logits on a GPU.

A thread has some pixels and goes over their classes again and again: for the maximum, for the sum of exponentials, for
the errors. Memory is read once, as the logits of a block stay in the caches; exponentials are computed anew, as keeping
them would take a register a class. So any number of classes will do, and no result leaves its thread but as an integer.

Launches switch the fusion of multiplications and additions off, so that both sweeps round alike, and the second one
finds each error in the bin in which the first one counted it.
"""

import triton
import triton.language as tl

from lovasz.core.triton_kernels.elementary import exponential, log1p
from lovasz.core.triton_kernels.planes import (
    FAULTS,
    FIRST_PIXEL,
    GRAD,
    JOINT,
    LABEL_BITS,
    LABEL_MASK,
    LOGITS,
    NOT_FINITE,
    OUT_OF_RANGE,
    PIXELS,
    add_count,
    add_counts_of_classes,
    first_segment,
    index_in_group,
    is_counted,
    load_words,
    plane_and_pixels,
)
from lovasz.core.triton_kernels.tables import (
    BINS,
    COUNTED,
    PASSED_OVER,
    count_errors,
    is_largest,
    largest_error_key,
    look_up,
)


@triton.jit
def load_class(first, stride, k, pixels, inside):
    """The pixels' logits of class k as float32; 0 outside the plane."""
    return tl.load(first + k * stride + pixels, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def first_logit(plane, DTYPE: tl.constexpr):
    return tl.load(plane + LOGITS).to(tl.pointer_type(DTYPE))


@triton.jit
def maximum_of(first, stride, classes, pixels, inside):
    """(largest logit, its class: the first of equals, whether all logits are finite) of each pixel."""
    maximum = load_class(first, stride, 0, pixels, inside)
    prediction = tl.zeros_like(pixels)
    finite = tl.abs(maximum) < float("inf")
    for k in range(1, classes):
        logits = load_class(first, stride, k, pixels, inside)
        is_larger = logits > maximum
        maximum = tl.where(is_larger, logits, maximum)
        prediction = tl.where(is_larger, k, prediction)
        finite &= tl.abs(logits) < float("inf")
    return maximum, prediction, finite


@triton.jit
def sums_of_exponentials(first, stride, classes, maximum, labels, pixels, inside):
    """(total, others): sums over all classes, and over all but the label's.

    Others + the label's would not do for the total: equal logits have to give equal errors, whatever their label. In
    float64 the sums lose nothing over hundreds of classes.
    """
    total = tl.zeros_like(maximum).to(tl.float64)
    others = tl.zeros_like(maximum).to(tl.float64)
    for k in range(classes):
        exponentials = exponential(load_class(first, stride, k, pixels, inside) - maximum).to(tl.float64)
        total += exponentials
        others += tl.where(labels == k, 0.0, exponentials)
    return total.to(tl.float32), others.to(tl.float32)


@triton.jit
def errors_of(first, stride, k, maximum, reciprocal, label_error, labels, pixels, inside, PROBABILITIES: tl.constexpr):
    """The errors of class k: its probability, and at pixels of this label the sum of the others'."""
    logits = load_class(first, stride, k, pixels, inside)
    if PROBABILITIES:
        # They need not add up to 1.
        errors = tl.where(labels == k, 1.0 - logits, logits)
    else:
        errors = tl.where(labels == k, label_error, exponential(logits - maximum) * reciprocal)
    return errors


@triton.jit(do_not_specialize=["classes", "pixel_count"])
def softmax_sweep(
    planes,
    block_planes,
    first_blocks,
    words,
    classes,
    terms,
    states,
    tables,
    winners,
    faults,
    predictions,
    cross_terms,
    cross_constants,
    cross_weights,
    pixel_losses,
    pixel_count,
    tolerance,
    DTYPE: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    TERMS: tl.constexpr,
    CROSS_TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first sweep: fills the tables, finds the largest errors of absent classes, counts predictions and faults.

    Args:
        states: int8, one a segment.
        winners: int64, one a segment: the greatest ``largest_error_key``.
        faults: int64, shape (planes, FAULTS).
        predictions: int64, shape (planes, 2, classes): pixels of each prediction, and those among them that are right.
        cross_constants: float32, shape (cross-entropy terms, 3): what the label's part of the target is multiplied
            with, what the part spread over all classes is, and the sum of the class weights.
        cross_weights: float32, shape (cross-entropy terms, classes).
        pixel_losses: float32, shape (cross-entropy terms, pixel_count).
    """
    plane, number, pixels, inside = plane_and_pixels(planes, block_planes, first_blocks, BLOCK)
    first = first_logit(plane, DTYPE)
    stride = tl.load(plane + PIXELS)
    word = load_words(words, plane, pixels, inside)
    labels = word & LABEL_MASK
    counted = (word >> LABEL_BITS) != 0
    maximum, prediction, finite = maximum_of(first, stride, classes, pixels, inside)
    add_count(faults + number * FAULTS + NOT_FINITE, counted & ~finite)
    # Pixels that are not finite are in no table: what is said of their joint has no meaning.
    counted &= finite
    add_counts_of_classes(predictions + number * 2 * classes, classes, prediction, counted)
    hits = counted & (prediction == labels)
    add_counts_of_classes(predictions + (number * 2 + 1) * classes, classes, prediction, hits)

    if PROBABILITIES:
        low = maximum
        for k in range(classes):
            low = tl.minimum(low, load_class(first, stride, k, pixels, inside))
        out_of_range = (low < -tolerance) | (maximum > 1.0 + tolerance)
        add_count(faults + number * FAULTS + OUT_OF_RANGE, counted & out_of_range)
        # Not used; a kernel's variables have to be there on all ways.
        reciprocal = maximum
        label_error = maximum
    else:
        total, others = sums_of_exponentials(first, stride, classes, maximum, labels, pixels, inside)
        reciprocal = tl.div_rn(1.0, total)
        label_error = others * reciprocal

    for t in tl.static_range(TERMS):
        term = terms + 3 * t
        valid = finite & is_counted(word, term)
        index = index_in_group(plane, term, pixels)
        first_of_classes = first_segment(plane, term, classes)
        for k in range(classes):
            segment = first_of_classes + k
            state = tl.load(states + segment)
            if state != PASSED_OVER:
                errors = errors_of(
                    first, stride, k, maximum, reciprocal, label_error, labels, pixels, inside, PROBABILITIES
                )
                if state == COUNTED:
                    count_errors(tables + segment * (2 * BINS), errors, 0, labels == k, valid)
                else:
                    keys = largest_error_key(errors, index, valid)
                    tl.atomic_max(winners + segment, tl.max(keys, axis=0), sem="relaxed")

    for e in tl.static_range(CROSS_TERMS):
        valid = finite & is_counted(word, cross_terms + e)
        label_logits = tl.load(first + labels * stride + pixels, mask=inside, other=0.0).to(tl.float32)
        label_exponential = exponential(label_logits - maximum)
        log_total = tl.log(total)
        # Near p = 1, log1p keeps the digits that the difference loses.
        likely = label_exponential > others
        ratio = tl.where(likely, others / label_exponential, 0.0)
        negative_log = tl.where(likely, log1p(ratio), log_total - (label_logits - maximum))
        weights = tl.load(cross_weights + e * classes + labels)
        loss = tl.load(cross_constants + 3 * e) * (negative_log * weights)
        smoothing = tl.load(cross_constants + 3 * e + 1)
        if smoothing > 0:
            weighted = tl.zeros_like(maximum)
            for k in range(classes):
                shifted = load_class(first, stride, k, pixels, inside) - maximum
                weighted += tl.load(cross_weights + e * classes + k) * shifted
            loss += smoothing * (tl.load(cross_constants + 3 * e + 2) * log_total - weighted)
        places = pixel_losses + e * pixel_count + tl.load(plane + FIRST_PIXEL) + pixels
        tl.store(places, tl.where(valid, loss, 0.0), mask=inside)


@triton.jit(do_not_specialize=["classes"])
def softmax_backward(
    planes,
    block_planes,
    first_blocks,
    words,
    classes,
    terms,
    states,
    tables,
    winners,
    weights,
    cross_terms,
    cross_constants,
    cross_weights,
    cross_scales,
    DTYPE: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    TERMS: tl.constexpr,
    CROSS_TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The second sweep: computes the errors anew, looks their gradients up, and goes back through softmax.

    With h_k = dloss/dp_k = g_k, and -g_y on the label's class y: dloss/dz_k = p_k (h_k - sum_j p_j h_j). On the label's
    class, 1 - p_y is the sum of the others, so nothing cancels (docs/mathematics.md).

    Args:
        tables: scanned, entries in place of words.
        weights: float64, one a segment.
        cross_constants, cross_weights: as for ``softmax_sweep``.
        cross_scales: float32, shape (joints, cross-entropy terms, 2): what a pixel's class weight is multiplied with
            to be its pull, and the spread of the smoothed part.
    """
    plane, _, pixels, inside = plane_and_pixels(planes, block_planes, first_blocks, BLOCK)
    first = first_logit(plane, DTYPE)
    stride = tl.load(plane + PIXELS)
    grads = tl.load(plane + GRAD).to(tl.pointer_type(tl.float32)) + pixels
    word = load_words(words, plane, pixels, inside)
    labels = word & LABEL_MASK
    counted = (word >> LABEL_BITS) != 0
    maximum, _, _ = maximum_of(first, stride, classes, pixels, inside)
    if PROBABILITIES:
        # Not used; a kernel's variables have to be there on all ways.
        reciprocal = maximum
        label_error = maximum
    else:
        total, others = sums_of_exponentials(first, stride, classes, maximum, labels, pixels, inside)
        reciprocal = tl.div_rn(1.0, total)
        label_error = others * reciprocal

    label_g = tl.zeros_like(maximum)
    others_pg = tl.zeros_like(maximum).to(tl.float64)
    for t in tl.static_range(TERMS):
        term = terms + 3 * t
        valid = is_counted(word, term)
        index = index_in_group(plane, term, pixels)
        first_of_classes = first_segment(plane, term, classes)
        for k in range(classes):
            segment = first_of_classes + k
            state = tl.load(states + segment)
            g = tl.zeros_like(maximum)
            if state != PASSED_OVER:
                errors = errors_of(
                    first, stride, k, maximum, reciprocal, label_error, labels, pixels, inside, PROBABILITIES
                )
                if state == COUNTED:
                    g = look_up(tables + segment * (2 * BINS), errors, 0, labels == k, valid)
                else:
                    is_winner = valid & is_largest(tl.load(winners + segment), index)
                    g = tl.where(is_winner, tl.load(weights + segment).to(tl.float32), 0.0)
                others_pg += tl.where(labels == k, 0.0, errors * g).to(tl.float64)
                label_g += tl.where(labels == k, g, 0.0)
            if PROBABILITIES:
                g = tl.where(labels == k, -g, g)
            # It waits in the gradient's place for what the other terms add, and for the sum over the classes.
            if t > 0:
                g += tl.load(grads + k * stride, mask=inside, other=0.0)
            tl.store(grads + k * stride, g, mask=inside)

    if not PROBABILITIES:
        tl.debug_barrier()
        label_logits = tl.load(first + labels * stride + pixels, mask=inside, other=0.0).to(tl.float32)
        label_probability = exponential(label_logits - maximum) * reciprocal
        others = others_pg.to(tl.float32)
        shift = label_probability * label_g - others
        label_grad = -label_probability * (label_g * label_error + others)
        scales = cross_scales + tl.load(plane + JOINT) * (2 * CROSS_TERMS)
        for e in tl.static_range(CROSS_TERMS):
            pull = tl.load(scales + 2 * e) * tl.load(cross_weights + e * classes + labels)
            pull = tl.where(is_counted(word, cross_terms + e), pull, 0.0)
            shift += pull
            label_grad -= pull * label_error
        for k in range(classes):
            is_label = labels == k
            logits = load_class(first, stride, k, pixels, inside)
            probabilities = exponential(logits - maximum) * reciprocal
            g = tl.load(grads + k * stride, mask=inside, other=0.0)
            grad = tl.where(is_label, label_grad, probabilities * (g + shift))
            for e in tl.static_range(CROSS_TERMS):
                spread = tl.load(scales + 2 * e + 1)
                if spread != 0:
                    off_target = probabilities * tl.load(cross_constants + 3 * e + 2)
                    off_target -= tl.load(cross_weights + e * classes + k)
                    grad += tl.where(is_counted(word, cross_terms + e), spread * off_target, 0.0)
            tl.store(grads + k * stride, tl.where(counted, grad, 0.0), mask=inside)
