"""Pixels on a GPU: the planes that they come in, and the sweep that reads their labels.

A *plane* is a run of pixels that share a label map: an image, or one binary label of an image. A program takes a block
of one plane, whose place in memory its row of ``planes`` tells (:class:`Plane`): requests of any sizes go in one launch
and nothing is copied together.

What is computed for a pixel depends on its logits and its label alone, and what is added up over pixels is integers:
no result depends on the batch or on the order in which blocks run.
"""

import enum

import triton
import triton.language as tl


class Plane(enum.IntEnum):
    """The columns of ``planes``, int64: addresses, sizes and numbers."""

    LOGITS = 0
    """Address of the plane's first logit; further classes follow in steps of PIXELS elements."""
    LABELS = 1
    """Address of its first label."""
    GRAD = 2
    """Address of its first derivative, float32, laid out as the logits."""
    PIXELS = 3
    FIRST_PIXEL = 4
    """Where its pixels begin among those of all planes."""
    FIRST_IN_JOINT = 5
    """Where its pixels begin among those of its joint (of its label, for the hinge)."""
    JOINT = 6
    IMAGE = 7
    """Among the images of all joints."""
    CHANNEL = 8
    """Which binary label it is; 0 for softmax."""


LOGITS = tl.constexpr(Plane.LOGITS.value)
LABELS = tl.constexpr(Plane.LABELS.value)
GRAD = tl.constexpr(Plane.GRAD.value)
PIXELS = tl.constexpr(Plane.PIXELS.value)
FIRST_PIXEL = tl.constexpr(Plane.FIRST_PIXEL.value)
FIRST_IN_JOINT = tl.constexpr(Plane.FIRST_IN_JOINT.value)
JOINT = tl.constexpr(Plane.JOINT.value)
IMAGE = tl.constexpr(Plane.IMAGE.value)
CHANNEL = tl.constexpr(Plane.CHANNEL.value)
COLUMNS = tl.constexpr(len(Plane))

LABEL_BITS = tl.constexpr(16)
"""A pixel's word: its label (0 if it has none), and above it one bit a rule: whether that rule counts the pixel."""
LABEL_MASK = tl.constexpr((1 << 16) - 1)

BAD_LABELS = tl.constexpr(0)
NOT_FINITE = tl.constexpr(1)
OUT_OF_RANGE = tl.constexpr(2)
FAULTS = tl.constexpr(3)


@triton.jit
def plane_and_pixels(planes, block_planes, first_blocks, BLOCK: tl.constexpr):
    """This program's plane: its row and its number; the pixels of the block, and whether they lie in the plane."""
    program = tl.program_id(0)
    number = tl.load(block_planes + program)
    plane = planes + number * COLUMNS
    pixels = (program - tl.load(first_blocks + number)) * BLOCK + tl.arange(0, BLOCK)
    return plane, number, pixels, pixels < tl.load(plane + PIXELS)


@triton.jit
def first_segment(plane, term, classes):
    """The segment of a term that the plane's first class belongs to. A term: rule, per_image, its first segment."""
    group = tl.where(tl.load(term + 1) != 0, tl.load(plane + IMAGE), tl.load(plane + JOINT))
    return tl.load(term + 2) + group * classes + tl.load(plane + CHANNEL)


@triton.jit
def index_in_group(plane, term, pixels):
    """Where pixels stand in their group: by image, and within an image by raster."""
    return pixels + tl.where(tl.load(term + 1) != 0, 0, tl.load(plane + FIRST_IN_JOINT))


@triton.jit
def is_counted(words, term):
    """Whether a term, or its rule, counts each pixel."""
    return ((words >> (LABEL_BITS + tl.load(term).to(tl.int32))) & 1) != 0


@triton.jit
def add_count(counter, flags):
    """Adds the number of true flags to a counter; most blocks have none."""
    count = tl.sum(flags.to(tl.int32))
    tl.atomic_add(counter, count.to(tl.int64), mask=count > 0, sem="relaxed")


@triton.jit
def add_counts_of_classes(counters, classes, numbers, flags):
    """Adds to the counter of each class how many of the pixels with true flags have its number."""
    numbers = tl.where(flags, numbers, -1)
    for first in range(0, classes, 32):
        some = first + tl.arange(0, 32)
        counts = tl.sum((numbers[None, :] == some[:, None]).to(tl.int32), axis=1)
        tl.atomic_add(counters + some, counts.to(tl.int64), mask=(some < classes) & (counts > 0), sem="relaxed")


@triton.jit(do_not_specialize=["plane_count", "values"])
def read_labels(
    planes,
    block_planes,
    first_blocks,
    rules,
    words,
    counts,
    faults,
    plane_count,
    values,
    LABEL: tl.constexpr,
    RULES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Checks the labels, makes them words, and counts them.

    A rule says what is void: a label value to ignore, and whether there is one. ``counts``, int64, has shape (rules,
    planes, values), with one more row for the pixels that any of several rules counts.
    """
    plane, number, pixels, inside = plane_and_pixels(planes, block_planes, first_blocks, BLOCK)
    addresses = tl.load(plane + LABELS).to(tl.pointer_type(LABEL)) + pixels
    labels = tl.load(addresses, mask=inside, other=0).to(tl.int64)
    in_range = inside & (labels >= 0) & (labels < values)
    safe_labels = tl.where(in_range, labels, 0).to(tl.int32)
    word = safe_labels
    ignoring_rules = tl.zeros_like(word)
    for rule in tl.static_range(RULES):
        ignored = (tl.load(rules + 2 * rule + 1) != 0) & (labels == tl.load(rules + 2 * rule))
        valid = in_range & ~ignored
        ignoring_rules += ignored.to(tl.int32)
        word |= valid.to(tl.int32) << (LABEL_BITS + rule)
        add_counts_of_classes(counts + (rule * plane_count + number) * values, values, safe_labels, valid)
    if RULES > 1:
        any_counters = counts + (RULES * plane_count + number) * values
        add_counts_of_classes(any_counters, values, safe_labels, (word >> LABEL_BITS) != 0)
    tl.store(words + tl.load(plane + FIRST_PIXEL) + pixels, word, mask=inside)
    add_count(faults + number * FAULTS + BAD_LABELS, inside & ~in_range & (ignoring_rules < RULES))


@triton.jit
def load_words(words, plane, pixels, inside):
    """The pixels' words; none counts outside the plane."""
    return tl.load(words + tl.load(plane + FIRST_PIXEL) + pixels, mask=inside, other=0)
