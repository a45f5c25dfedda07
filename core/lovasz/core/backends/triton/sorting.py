"""Sorts pixels: whole segments of small groups, and the buckets of tables. A kernel instance sorts at most 4096 pixels.

The keys are integers that order pixels by descending error, then foreground before background, then by position in the
batch (docs/mathematics.md, section 7).
"""

import triton
import triton.language as tl

from lovasz.core.backends.triton.columns import (
    ADDRESS_COLUMNS,
    ADDRESS_GRAD,
    GROUP_BINS,
    GROUP_COLUMNS,
    GROUP_FIRST_PLANE,
    GROUP_LIST,
    GROUP_LIST_ROOM,
    GROUP_PIXELS,
    GROUP_PLANE_STEP,
    GROUP_PLANES,
    GROUP_TERM,
    PASSED_OVER,
    PLANE_COLUMNS,
    PLANE_FIRST_PIXEL,
    PLANE_IMAGE_PIXELS,
    SEGMENT_COLUMNS,
    SEGMENT_FOREGROUND,
    SEGMENT_LOSS,
    SEGMENT_STATE,
    SEGMENT_UNIT,
    SEGMENT_WEIGHT,
)
from lovasz.core.backends.triton.planes import first_elements
from lovasz.core.backends.triton.tables import BEFORE_NONE, LOW_WORD, in_units

PIXEL_MASK = tl.constexpr((1 << 31) - 1)
FOREGROUND_BIT = tl.constexpr(31)


@triton.jit
def sort_keys(bits, is_foreground, pixel):
    """Keys for a descending sort: the bits of the error, whether it is foreground, and the inverted pixel number."""
    return (
        (bits.to(tl.int64) << 32) | (is_foreground.to(tl.int64) << FOREGROUND_BIT) | (pixel ^ PIXEL_MASK).to(tl.int64)
    )


@triton.jit
def list_keys(entries, bits, is_foreground, pixel, bucket_befores, bucket_counts, own_list, mask):
    """Adds the keys of pixels to the lists of their buckets.

    Args:
        entries: the entries of the pixels' bins, each naming a bucket where the mask is true.
        bucket_befores, bucket_counts: those of the segment's first bucket.
        own_list: the segment's list.
    """
    bucket = tl.where(mask, -1 - entries, 0)
    place = tl.atomic_add(bucket_counts + bucket, 1, mask=mask, sem="relaxed")
    before = -tl.load(bucket_befores + bucket, mask=mask, other=0) + BEFORE_NONE
    place += (before & LOW_WORD).to(tl.int32) + (before >> 32).to(tl.int32)
    tl.store(own_list + place, sort_keys(bits, is_foreground, pixel), mask=mask)


@triton.jit
def rank(keys, foreground_count, foreground_before, background_before):
    """Sorts keys and computes the gradient g of each pixel; negative keys are padding.

    Args:
        foreground_count: the foreground pixels of the segment.
        foreground_before, background_before: the pixels of the segment that come before all of these.

    Returns:
        (sorted keys, whether each is a pixel's, errors, g).
    """
    keys = tl.sort(keys, descending=True)
    is_key = keys >= 0
    is_foreground = is_key & (((keys >> FOREGROUND_BIT) & 1) != 0)
    n = foreground_before + tl.cumsum(is_foreground.to(tl.int32), 0)
    b = background_before + foreground_before + tl.arange(0, keys.shape[0]) + 1 - n
    union = (foreground_count + b).to(tl.float32)
    left = (foreground_count - n).to(tl.float32)
    g = tl.where(is_foreground, 1.0 / union, left / (union * tl.maximum(union - 1.0, 1.0)))
    if foreground_count == 0:
        g = tl.where(tl.arange(0, keys.shape[0]) == 0, 1.0, 0.0)
    return keys, is_key, (keys >> 32).to(tl.int32).to(tl.float32, bitcast=True), g


@triton.jit
def planes_of(pixel, planes, first_plane, plane_count):
    """The number of each pixel's plane, by binary search among consecutive planes."""
    left = plane_count.to(tl.int32)
    low = tl.zeros_like(pixel) + first_plane.to(tl.int32)
    high = low + (left - 1)
    while left > 1:
        middle = (low + high + 1) // 2
        is_before = tl.load(planes + middle * PLANE_COLUMNS + PLANE_FIRST_PIXEL).to(tl.int32) <= pixel
        low = tl.where(is_before, middle, low)
        high = tl.where(is_before, high, middle - 1)
        left = (left + 1) // 2
    return low


@triton.jit
def hand_out(
    keys,
    is_key,
    g,
    addresses,
    planes,
    first_plane,
    plane_count,
    more_grads,
    element_count,
    term,
    channels,
    channel,
    BINARY: tl.constexpr,
):
    """Writes each pixel's g to the gradient's memory for the first term, or to ``more_grads`` for the other terms."""
    pixel = (keys & PIXEL_MASK).to(tl.int32) ^ PIXEL_MASK
    number = planes_of(pixel, planes, first_plane, plane_count)
    plane = planes + number * PLANE_COLUMNS
    first_pixel = tl.load(plane + PLANE_FIRST_PIXEL).to(tl.int32)
    element = first_elements(plane, tl.where(is_key, pixel - first_pixel, 0), channels)
    if not BINARY:
        element += channel * tl.load(plane + PLANE_IMAGE_PIXELS)
    if term > 0:
        element = pixel.to(tl.int64) if BINARY else element + first_pixel.to(tl.int64) * channels
        tl.store(more_grads + (term - 1) * element_count + element, g, mask=is_key)
    else:
        base = tl.load(addresses + number * ADDRESS_COLUMNS + ADDRESS_GRAD).to(tl.pointer_type(tl.float32))
        tl.store(base + element, g, mask=is_key)


@triton.jit
def rank_bucket(
    addresses,
    planes,
    group,
    segment,
    channel,
    own_list,
    count,
    foreground_before,
    background_before,
    more_grads,
    channels,
    element_count,
    BINARY: tl.constexpr,
    WANT_GRAD: tl.constexpr,
    ROOM: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Sorts the pixels of a list, adds their part of the loss, and writes their g."""
    # The keys may be in any order before the sort. In this one, a thread holds consecutive keys, so that most steps of
    # the sort compare keys of one thread, and few compare keys of two warps.
    places = tl.arange(0, ROOM // THREADS)[:, None] * THREADS + tl.arange(0, THREADS)[None, :]
    keys = tl.load(own_list + places, mask=places < count, other=-1)
    keys = tl.reshape(tl.trans(keys), [ROOM])
    foreground_count = tl.load(segment + SEGMENT_FOREGROUND).to(tl.int32)
    keys, is_key, errors, g = rank(keys, foreground_count, foreground_before, background_before)
    losses = tl.where(is_key, g.to(tl.float64) * errors.to(tl.float64), 0.0)
    tl.atomic_add(segment + SEGMENT_LOSS, tl.sum(in_units(losses, tl.load(segment + SEGMENT_UNIT))), sem="relaxed")
    if WANT_GRAD:
        weight = tl.load(segment + SEGMENT_WEIGHT).to(tl.float64, bitcast=True).to(tl.float32)
        first_plane = tl.load(group + GROUP_FIRST_PLANE)
        if BINARY:
            first_plane += channel * tl.load(group + GROUP_PLANE_STEP)
        hand_out(
            keys=keys,
            is_key=is_key,
            g=g * weight,
            addresses=addresses,
            planes=planes,
            first_plane=first_plane,
            plane_count=tl.load(group + GROUP_PLANES),
            more_grads=more_grads,
            element_count=element_count,
            term=tl.load(group + GROUP_TERM),
            channels=channels,
            channel=channel,
            BINARY=BINARY,
        )


@triton.jit(do_not_specialize=["channels", "element_count"])
def sort_buckets(
    addresses,
    planes,
    groups,
    segments,
    bucket_segments,
    bucket_befores,
    bucket_counts,
    lists,
    more_grads,
    channels,
    element_count,
    BINARY: tl.constexpr,
    WANT_GRAD: tl.constexpr,
    HALVES: tl.constexpr,
    ROOM: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Sorts the pixels of the buckets. One instance per bucket; each segment of a small group is one bucket.

    Args:
        bucket_segments: int64, one per bucket: its segment.
        bucket_befores: int64, one per bucket: as ``tables.scan`` writes it.
        bucket_counts: int32, one per bucket: its pixels.
        lists: int64: the keys of each segment, those of its buckets one after another.
        HALVES: whether to compile a second sort, for buckets with at most ROOM / 2 pixels.
        ROOM: the number of keys that an instance sorts.
        THREADS: the number of threads of an instance.
    """
    program = tl.program_id(0)
    number = tl.load(bucket_segments + program)
    row = number // channels
    channel = number - row * channels
    group = groups + row * GROUP_COLUMNS
    segment = segments + number * SEGMENT_COLUMNS
    count = tl.load(bucket_counts + program)
    foreground_before = 0
    background_before = 0
    if tl.load(group + GROUP_BINS) == 0:
        count = tl.where(tl.load(segment + SEGMENT_STATE) != PASSED_OVER, tl.load(group + GROUP_PIXELS), 0).to(tl.int32)
    elif count > 0:
        before = -tl.load(bucket_befores + program) + BEFORE_NONE
        foreground_before = (before >> 32).to(tl.int32)
        background_before = (before & LOW_WORD).to(tl.int32)
    own_list = lists + tl.load(group + GROUP_LIST) + channel * tl.load(group + GROUP_LIST_ROOM)
    own_list += foreground_before + background_before
    if HALVES and (count > 0) & (count <= ROOM // 2):  # Not compiled without HALVES: "and" decides, "&" would not.
        rank_bucket(
            addresses=addresses,
            planes=planes,
            group=group,
            segment=segment,
            channel=channel,
            own_list=own_list,
            count=count,
            foreground_before=foreground_before,
            background_before=background_before,
            more_grads=more_grads,
            channels=channels,
            element_count=element_count,
            BINARY=BINARY,
            WANT_GRAD=WANT_GRAD,
            ROOM=ROOM // 2,
            THREADS=THREADS,
        )
    elif count > 0:
        rank_bucket(
            addresses=addresses,
            planes=planes,
            group=group,
            segment=segment,
            channel=channel,
            own_list=own_list,
            count=count,
            foreground_before=foreground_before,
            background_before=background_before,
            more_grads=more_grads,
            channels=channels,
            element_count=element_count,
            BINARY=BINARY,
            WANT_GRAD=WANT_GRAD,
            ROOM=ROOM,
            THREADS=THREADS,
        )
