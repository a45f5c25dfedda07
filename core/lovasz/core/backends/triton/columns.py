"""The columns of the arrays that host and kernels share: int64, unless noted otherwise.

:mod:`lovasz.core.plan` defines planes and groups; for binary losses, each label has planes of its own. Segments are
numbered (row of the group) x channels + channel. Groups with few pixels have no tables; their segments are sorted.
"""

import enum

import triton.language as tl

from lovasz.core.computed import Fault
from lovasz.core.scoring import State


class Address(enum.IntEnum):
    """One row per plane: addresses, the only numbers that change from one call to the next."""

    LOGITS = 0
    """The plane's first logit."""
    LABELS = 1
    """The plane's first label."""
    GRAD = 2
    """The gradient of the first logit; float32, in the layout of the logits."""


class Plane(enum.IntEnum):
    """One row per plane. The planes of a group are consecutive, and so are their pixels."""

    PIXELS = 0
    IMAGE_PIXELS = 1
    """The pixels of one image: the distance from one class to the next."""
    FIRST_BLOCK = 2
    """The number of the first kernel instance that works on the plane in a sweep."""
    FIRST_PIXEL = 3
    """The number of the plane's first pixel among the pixels of all planes."""
    JOINT = 4
    IMAGE = 5
    """The number of the plane in the plan; it is the number of an image if a term has ``per_image``."""
    CHANNEL = 6
    """The binary label of the plane; 0 for softmax."""


class Rule(enum.IntEnum):
    """One row per rule."""

    VALUE = 0
    """The label that the rule ignores; 0 if there is none."""
    IN_USE = 1
    """Whether the rule ignores a label, 0 or 1."""


class Grouping(enum.IntEnum):
    """One row per grouping: a rule and a kind of group (image or joint) for which some term needs counters."""

    RULE = 0
    """The number of the rule; -1 to count the pixels that are valid for any rule."""
    PER_IMAGE = 1
    """Whether the groups are images, 0 or 1."""
    COUNTERS = 2
    """Where the counters of the first group begin."""


class Term(enum.IntEnum):
    """One row per Lovász term."""

    RULE = 0
    PER_IMAGE = 1
    FIRST_ROW = 2
    """The row of the term's first group."""
    LISTS_CLASSES = 3
    """1 if the flagged classes are scored, present or not; 0 if the present classes are scored."""


class Group(enum.IntEnum):
    """One row per group of each Lovász term. For binary losses, planes and pixels are those of the first channel."""

    TERM = 0
    COUNTERS = 1
    """Where the counters of the group begin."""
    FIRST_PLANE = 2
    PLANE_STEP = 3
    """For binary losses, the number of planes from one channel of the group to the next."""
    PIXEL_STEP = 4
    """For binary losses, the number of pixels from one channel of the group to the next."""
    PLANES = 5
    FIRST_PIXEL = 6
    PIXELS = 7
    SHARE = 8
    """The group's share of its joint's loss, the bits of a float64."""
    BINS = 9
    """The number of bins of each of the group's tables; 0 if all of its segments are sorted."""
    WORDS = 10
    """Where the group's first table begins among the words."""
    MAP = 11
    """Where the map of the group's tables begins; for binary losses, the map of its first table."""
    LIST = 12
    """Where the list of the group's first segment begins."""
    LIST_ROOM = 13
    """The number of elements of each segment's list."""
    FIRST_BUCKET = 14
    BUCKETS = 15
    """The number of buckets of each segment."""
    RANKED_BELOW = 16
    """Segments with fewer foreground pixels than this have the pixels of their buckets sorted."""


class Segment(enum.IntEnum):
    """One row per segment; the host reads it."""

    STATE = 0
    LOSS = 1
    """The loss before weights, in units of 2^UNIT."""
    UNIT = 2
    LARGEST = 3
    """The maximum of ``largest_error_key``, for a segment without foreground in a group with tables."""
    FOREGROUND = 4
    """The number of foreground pixels."""
    VALID = 5
    """The number of foreground and background pixels."""
    WEIGHT = 6
    """The factor of the gradient, the bits of a float64."""


class Cross(enum.IntEnum):
    """One row per cross-entropy term, of softmax or binary, and joint; the host reads it."""

    SUM = 0
    """The sum of the pixels' losses, in units of 2^UNIT."""
    UNIT = 1
    LARGEST = 2
    """The largest loss of a pixel, the bits of a float32; of binary cross-entropy, the bits of a float64."""
    MEAN = 3
    """The factor that makes a mean of the sum, the bits of a float64: 1 / (sum of the class weights of the pixels) or,
    for binary cross-entropy, 1 / (the number of valid pixels over all labels); 0 if there is nothing to divide by."""


class SoftmaxCounter(enum.IntEnum):
    """The counters of each group, K of each; int32."""

    PIXELS = 0
    """The pixels of each class."""
    INVERTED_LEAST = 1
    """The bits of the smallest foreground error, inverted so that a maximum finds it."""


class BinaryCounter(enum.IntEnum):
    """The counters of each group, K of each; int32."""

    FOREGROUND = 0
    """The number of foreground pixels."""
    VALID = 1
    """The number of foreground and background pixels."""
    INVERTED_LEAST = 2
    """The bits of the smallest foreground error, inverted so that a maximum finds it."""
    LARGEST = 3
    """The bits of the largest error."""


class Outcome(enum.IntEnum):
    """The counters of predictions of each joint, K of each; int32."""

    PREDICTED = 0
    """The pixels predicted as each class."""
    HIT = 1
    """The pixels predicted as each class that belong to it."""


class Half(enum.IntEnum):
    """The halves of a table; each has one word per bin."""

    BACKGROUND = 0
    FOREGROUND = 1


class Factor(enum.IntEnum):
    """One row per cross-entropy term; float64."""

    LABEL = 0
    """``label_factor`` of :class:`lovasz.core.plan.Term`."""
    SPREAD = 1
    """``spread_factor`` of :class:`lovasz.core.plan.Term`."""


class Scale(enum.IntEnum):
    """One row per joint and cross-entropy term: factors of cross-entropy's gradient; float32.

    The gradient with respect to logit k of a pixel with label y is

        PULL x weight_y x (p_k - [k = y]) + SPREAD x (sum of class weights x p_k - weight_k).
    """

    PULL = 0
    SPREAD = 1


ADDRESS_LOGITS = tl.constexpr(Address.LOGITS.value)
ADDRESS_LABELS = tl.constexpr(Address.LABELS.value)
ADDRESS_GRAD = tl.constexpr(Address.GRAD.value)
ADDRESS_COLUMNS = tl.constexpr(len(Address))

PLANE_PIXELS = tl.constexpr(Plane.PIXELS.value)
PLANE_IMAGE_PIXELS = tl.constexpr(Plane.IMAGE_PIXELS.value)
PLANE_FIRST_BLOCK = tl.constexpr(Plane.FIRST_BLOCK.value)
PLANE_FIRST_PIXEL = tl.constexpr(Plane.FIRST_PIXEL.value)
PLANE_JOINT = tl.constexpr(Plane.JOINT.value)
PLANE_IMAGE = tl.constexpr(Plane.IMAGE.value)
PLANE_CHANNEL = tl.constexpr(Plane.CHANNEL.value)
PLANE_COLUMNS = tl.constexpr(len(Plane))

RULE_VALUE = tl.constexpr(Rule.VALUE.value)
RULE_IN_USE = tl.constexpr(Rule.IN_USE.value)
RULE_COLUMNS = tl.constexpr(len(Rule))

GROUPING_RULE = tl.constexpr(Grouping.RULE.value)
GROUPING_PER_IMAGE = tl.constexpr(Grouping.PER_IMAGE.value)
GROUPING_COUNTERS = tl.constexpr(Grouping.COUNTERS.value)
GROUPING_COLUMNS = tl.constexpr(len(Grouping))

TERM_RULE = tl.constexpr(Term.RULE.value)
TERM_PER_IMAGE = tl.constexpr(Term.PER_IMAGE.value)
TERM_FIRST_ROW = tl.constexpr(Term.FIRST_ROW.value)
TERM_LISTS_CLASSES = tl.constexpr(Term.LISTS_CLASSES.value)
TERM_COLUMNS = tl.constexpr(len(Term))

GROUP_TERM = tl.constexpr(Group.TERM.value)
GROUP_COUNTERS = tl.constexpr(Group.COUNTERS.value)
GROUP_FIRST_PLANE = tl.constexpr(Group.FIRST_PLANE.value)
GROUP_PLANE_STEP = tl.constexpr(Group.PLANE_STEP.value)
GROUP_PIXEL_STEP = tl.constexpr(Group.PIXEL_STEP.value)
GROUP_PLANES = tl.constexpr(Group.PLANES.value)
GROUP_FIRST_PIXEL = tl.constexpr(Group.FIRST_PIXEL.value)
GROUP_PIXELS = tl.constexpr(Group.PIXELS.value)
GROUP_SHARE = tl.constexpr(Group.SHARE.value)
GROUP_BINS = tl.constexpr(Group.BINS.value)
GROUP_WORDS = tl.constexpr(Group.WORDS.value)
GROUP_MAP = tl.constexpr(Group.MAP.value)
GROUP_LIST = tl.constexpr(Group.LIST.value)
GROUP_LIST_ROOM = tl.constexpr(Group.LIST_ROOM.value)
GROUP_FIRST_BUCKET = tl.constexpr(Group.FIRST_BUCKET.value)
GROUP_BUCKETS = tl.constexpr(Group.BUCKETS.value)
GROUP_RANKED_BELOW = tl.constexpr(Group.RANKED_BELOW.value)
GROUP_COLUMNS = tl.constexpr(len(Group))

SEGMENT_STATE = tl.constexpr(Segment.STATE.value)
SEGMENT_LOSS = tl.constexpr(Segment.LOSS.value)
SEGMENT_UNIT = tl.constexpr(Segment.UNIT.value)
SEGMENT_LARGEST = tl.constexpr(Segment.LARGEST.value)
SEGMENT_FOREGROUND = tl.constexpr(Segment.FOREGROUND.value)
SEGMENT_VALID = tl.constexpr(Segment.VALID.value)
SEGMENT_WEIGHT = tl.constexpr(Segment.WEIGHT.value)
SEGMENT_COLUMNS = tl.constexpr(len(Segment))

CROSS_SUM = tl.constexpr(Cross.SUM.value)
CROSS_UNIT = tl.constexpr(Cross.UNIT.value)
CROSS_LARGEST = tl.constexpr(Cross.LARGEST.value)
CROSS_MEAN = tl.constexpr(Cross.MEAN.value)
CROSS_COLUMNS = tl.constexpr(len(Cross))

SOFTMAX_LEAST = tl.constexpr(SoftmaxCounter.INVERTED_LEAST.value)
SOFTMAX_COUNTERS = tl.constexpr(len(SoftmaxCounter))

BINARY_FOREGROUND = tl.constexpr(BinaryCounter.FOREGROUND.value)
BINARY_VALID = tl.constexpr(BinaryCounter.VALID.value)
BINARY_LEAST = tl.constexpr(BinaryCounter.INVERTED_LEAST.value)
BINARY_LARGEST = tl.constexpr(BinaryCounter.LARGEST.value)
BINARY_COUNTERS = tl.constexpr(len(BinaryCounter))

OUTCOME_HIT = tl.constexpr(Outcome.HIT.value)
OUTCOMES = tl.constexpr(len(Outcome))

HALVES_OF_TABLE = tl.constexpr(len(Half))

FACTOR_LABEL = tl.constexpr(Factor.LABEL.value)
FACTOR_SPREAD = tl.constexpr(Factor.SPREAD.value)
FACTORS = tl.constexpr(len(Factor))

SCALE_PULL = tl.constexpr(Scale.PULL.value)
SCALE_SPREAD = tl.constexpr(Scale.SPREAD.value)
SCALES = tl.constexpr(len(Scale))

PASSED_OVER = tl.constexpr(State.PASSED_OVER.value)
SCORED = tl.constexpr(State.SCORED.value)
ABSENT = tl.constexpr(State.ABSENT.value)

BAD_LABEL = tl.constexpr(Fault.BAD_LABEL.value)
NOT_FINITE = tl.constexpr(Fault.NOT_FINITE.value)
OUT_OF_RANGE = tl.constexpr(Fault.OUT_OF_RANGE.value)
FAULTS = tl.constexpr(len(Fault))
