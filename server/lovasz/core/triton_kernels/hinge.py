"""The three sweeps over the hinge's logits on a GPU: one logit a pixel, each binary label a plane of its own.

The errors m = max(0, 1 - s x), s = +-1, have no largest possible one, so the first sweep finds each segment's, whose
exponent is the top of its table. They have a smallest one, though: 1 - s x is 0 or at least 2^-24.
"""

import triton
import triton.language as tl

from lovasz.core.triton_kernels.planes import (
    FAULTS,
    GRAD,
    LABEL_BITS,
    LABEL_MASK,
    LOGITS,
    NOT_FINITE,
    add_count,
    first_segment,
    index_in_group,
    is_counted,
    load_words,
    plane_and_pixels,
)
from lovasz.core.triton_kernels.tables import (
    ABSENT,
    BINS,
    COUNTED,
    count_errors,
    is_largest,
    largest_error_key,
    look_up,
)


@triton.jit
def load_errors(plane, word, pixels, inside, DTYPE: tl.constexpr):
    """(errors, logits, whether each pixel is foreground)."""
    addresses = tl.load(plane + LOGITS).to(tl.pointer_type(DTYPE)) + pixels
    logits = tl.load(addresses, mask=inside, other=0.0).to(tl.float32)
    is_foreground = (word & LABEL_MASK) == 1
    return tl.maximum(tl.where(is_foreground, 1.0 - logits, 1.0 + logits), 0.0), logits, is_foreground


@triton.jit(do_not_specialize=["channels"])
def largest_hinges(
    planes,
    block_planes,
    first_blocks,
    words,
    channels,
    terms,
    largest,
    faults,
    predictions,
    DTYPE: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first sweep: the bits of each segment's largest error, and counts of predictions and faults.

    Args:
        largest: int32, one a segment.
        faults: int64, shape (planes, FAULTS).
        predictions: int64, shape (planes, 2): pixels that are predicted foreground, and those among them that are.
    """
    plane, number, pixels, inside = plane_and_pixels(planes, block_planes, first_blocks, BLOCK)
    word = load_words(words, plane, pixels, inside)
    errors, logits, is_foreground = load_errors(plane, word, pixels, inside, DTYPE)
    finite = tl.abs(logits) < float("inf")
    counted = (word >> LABEL_BITS) != 0
    add_count(faults + number * FAULTS + NOT_FINITE, counted & ~finite)
    predicted = counted & (logits > 0)
    add_count(predictions + 2 * number, predicted)
    add_count(predictions + 2 * number + 1, predicted & is_foreground)
    for t in tl.static_range(TERMS):
        term = terms + 3 * t
        bits = errors.to(tl.int32, bitcast=True)
        bits = tl.max(tl.where(finite & is_counted(word, term), bits, 0), axis=0)
        tl.atomic_max(largest + first_segment(plane, term, channels), bits, sem="relaxed")


@triton.jit(do_not_specialize=["channels"])
def hinge_sweep(
    planes,
    block_planes,
    first_blocks,
    words,
    channels,
    terms,
    states,
    tops,
    tables,
    winners,
    DTYPE: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The second sweep: fills the tables, and finds the largest errors of segments without foreground.

    Args:
        states: int8, one a segment.
        tops: int32, one a segment: the exponent of the largest error.
        winners: int64, one a segment: the greatest ``largest_error_key``.
    """
    plane, _, pixels, inside = plane_and_pixels(planes, block_planes, first_blocks, BLOCK)
    word = load_words(words, plane, pixels, inside)
    errors, logits, is_foreground = load_errors(plane, word, pixels, inside, DTYPE)
    finite = tl.abs(logits) < float("inf")
    for t in tl.static_range(TERMS):
        term = terms + 3 * t
        valid = finite & is_counted(word, term)
        segment = first_segment(plane, term, channels)
        state = tl.load(states + segment)
        if state == COUNTED:
            count_errors(tables + segment * (2 * BINS), errors, tl.load(tops + segment), is_foreground, valid)
        if state == ABSENT:
            keys = largest_error_key(errors, index_in_group(plane, term, pixels), valid)
            tl.atomic_max(winners + segment, tl.max(keys, axis=0), sem="relaxed")


@triton.jit(do_not_specialize=["channels"])
def hinge_backward(
    planes,
    block_planes,
    first_blocks,
    words,
    channels,
    terms,
    states,
    tops,
    tables,
    winners,
    weights,
    DTYPE: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The third sweep: computes the errors anew and looks their gradients up.

    Args:
        tables: scanned, entries in place of words.
        weights: float64, one a segment.
    """
    plane, _, pixels, inside = plane_and_pixels(planes, block_planes, first_blocks, BLOCK)
    word = load_words(words, plane, pixels, inside)
    errors, _, is_foreground = load_errors(plane, word, pixels, inside, DTYPE)
    g = tl.zeros([BLOCK], tl.float32)
    for t in tl.static_range(TERMS):
        term = terms + 3 * t
        valid = is_counted(word, term)
        segment = first_segment(plane, term, channels)
        state = tl.load(states + segment)
        if state == COUNTED:
            g += look_up(tables + segment * (2 * BINS), errors, tl.load(tops + segment), is_foreground, valid)
        if state == ABSENT:
            is_winner = valid & is_largest(tl.load(winners + segment), index_in_group(plane, term, pixels))
            g += tl.where(is_winner, tl.load(weights + segment).to(tl.float32), 0.0)
    # Where relu cuts off, and on void pixels, the gradient is exactly 0.
    grad = tl.where(errors > 0, tl.where(is_foreground, -g, g), 0.0)
    places = tl.load(plane + GRAD).to(tl.pointer_type(tl.float32)) + pixels
    tl.store(places, grad, mask=inside)
