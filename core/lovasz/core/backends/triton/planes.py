"""Pixels on a GPU: the plane and the pixels that a kernel instance works on, and their labels.

An *instance* of a kernel is what Triton calls a program: one element of the grid, which runs on one multiprocessor. An
instance of a sweep works on a *block* of consecutive pixels of one plane. The pixels of a plane are numbered through
its images (image x pixels per image + position), so that a block is the same for images, volumes, and the points of a
cloud, each of which is an image of one pixel.

The values of a pixel depend on its logits and its label alone, and sums over pixels are sums of integers: no result
depends on the batch or on the order in which blocks run.
"""

import triton
import triton.language as tl

from lovasz.core.backends.triton.columns import (
    ADDRESS_COLUMNS,
    ADDRESS_LABELS,
    ADDRESS_LOGITS,
    FAULTS,
    GROUP_BINS,
    GROUP_COLUMNS,
    PLANE_COLUMNS,
    PLANE_FIRST_BLOCK,
    PLANE_IMAGE,
    PLANE_IMAGE_PIXELS,
    PLANE_JOINT,
    PLANE_PIXELS,
    RULE_COLUMNS,
    RULE_IN_USE,
    RULE_VALUE,
    TERM_FIRST_ROW,
    TERM_PER_IMAGE,
    TERM_RULE,
)


@triton.jit
def locate(addresses, planes, block_planes, BLOCK: tl.constexpr):
    """(the plane's row of addresses, the plane's row, the pixels of this block, whether each lies in the plane)."""
    program = tl.program_id(0)
    number = tl.load(block_planes + program)
    plane = planes + number * PLANE_COLUMNS
    pixels = (program - tl.load(plane + PLANE_FIRST_BLOCK)).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    return addresses + number * ADDRESS_COLUMNS, plane, pixels, pixels < tl.load(plane + PLANE_PIXELS).to(tl.int32)


@triton.jit
def first_elements(plane, pixels, channels):
    """The offset of each pixel's first class (binary losses: of its label) from the plane's first logit."""
    image_pixels = tl.load(plane + PLANE_IMAGE_PIXELS).to(tl.int32)
    return pixels + (pixels // image_pixels).to(tl.int64) * (channels - 1) * image_pixels


@triton.jit
def first_logits(address, elements, LOGIT: tl.constexpr):
    return tl.load(address + ADDRESS_LOGITS).to(tl.pointer_type(LOGIT)) + elements


@triton.jit
def read_labels(address, places, inside, rules, values, LABEL: tl.constexpr, RULES: tl.constexpr):
    """(labels, 0 where out of range; one bit per rule, 1 if the pixel is valid for it; whether each label is bad)."""
    labels = tl.load(tl.load(address + ADDRESS_LABELS).to(tl.pointer_type(LABEL)) + places, mask=inside, other=0)
    labels = labels.to(tl.int64)
    in_range = inside & (labels >= 0) & (labels < values)
    counting = tl.zeros_like(labels).to(tl.int32)
    ignoring = tl.zeros_like(counting)
    for rule in tl.static_range(RULES):
        row = rules + rule * RULE_COLUMNS
        ignored = (tl.load(row + RULE_IN_USE) != 0) & (labels == tl.load(row + RULE_VALUE))
        counting |= (in_range & ~ignored).to(tl.int32) << rule
        ignoring += ignored.to(tl.int32)
    return tl.where(in_range, labels, 0).to(tl.int32), counting, inside & ~in_range & (ignoring < RULES)


@triton.jit
def is_counted(counting, rule):
    """Whether each pixel is valid for a rule; for rule -1, whether it is valid for any rule."""
    return tl.where(rule < 0, counting != 0, ((counting >> tl.maximum(rule, 0).to(tl.int32)) & 1) != 0)


@triton.jit
def of_plane(plane, per_image):
    """The number of the plane's image or, if not ``per_image``, of its joint."""
    return tl.where(per_image != 0, tl.load(plane + PLANE_IMAGE), tl.load(plane + PLANE_JOINT))


@triton.jit
def group_on(plane, term, groups):
    """A term's group on this plane: (number of its row, its row, number of bins of its tables, 0 if it has none)."""
    row = tl.load(term + TERM_FIRST_ROW) + of_plane(plane, tl.load(term + TERM_PER_IMAGE))
    group = groups + row * GROUP_COLUMNS
    return row, group, tl.load(group + GROUP_BINS).to(tl.int32)


@triton.jit
def is_counted_by(term, counting):
    """Whether each pixel is valid for a term."""
    return is_counted(counting, tl.load(term + TERM_RULE))


@triton.jit
def add_fault(faults, plane, kind, flags):
    """Adds the number of true flags to the count of a fault in the plane's joint; most blocks have none."""
    count = tl.sum(flags.to(tl.int32))
    tl.atomic_add(faults + tl.load(plane + PLANE_JOINT) * FAULTS + kind, count, mask=count > 0, sem="relaxed")
