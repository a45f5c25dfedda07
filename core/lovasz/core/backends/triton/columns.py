"""The columns of the arrays that host and kernels share. All are int64 unless said otherwise.

Planes and groups are those of :mod:`lovasz.core.plan`; for the hinge, each binary label has planes of its own. A
*segment* is one class (a binary label) over the pixels of a group: segment = group's row x channels + channel. A
*table* belongs to a segment of a group that is not sorted.
"""

import enum

import triton.language as tl

from lovasz.core.computed import Fault
from lovasz.core.scoring import State


class Address(enum.IntEnum):
    """Of each plane: the only numbers that change from one call to the next."""

    LOGITS = 0
    """Its first logit."""
    LABELS = 1
    """Its first label."""
    GRAD = 2
    """Its first derivative: float32, laid out as the logits."""


class Plane(enum.IntEnum):
    """Of each plane. The planes of a group are consecutive, and so are their pixels."""

    PIXELS = 0
    IMAGE_PIXELS = 1
    """Pixels of an image: the distance from one class to the next."""
    FIRST_BLOCK = 2
    """The first program of a sweep that works on it."""
    FIRST_PIXEL = 3
    """Where its pixels begin among those of all planes."""
    JOINT = 4
    IMAGE = 5
    """Among the images of all joints; of the first one, if the plane holds several."""
    CHANNEL = 6
    """Which binary label it is; 0 for softmax."""


class Rule(enum.IntEnum):
    """What is void."""

    VALUE = 0
    """The label value to ignore, ..."""
    IN_USE = 1
    """... and whether there is one."""


class Grouping(enum.IntEnum):
    """Counters are kept for each pair of a rule and a kind of group that some term needs."""

    RULE = 0
    """Its number; -1: the pixels that any rule counts."""
    PER_IMAGE = 1
    COUNTERS = 2
    """Where the counters of its first group begin."""


class Term(enum.IntEnum):
    """Of each Lovász term."""

    RULE = 0
    PER_IMAGE = 1
    FIRST_ROW = 2
    """The row of its first group."""
    LISTS_CLASSES = 3
    """Whether the classes that are flagged are scored, present or not; else those that are present."""


class Group(enum.IntEnum):
    """Of each group of each Lovász term: a row."""

    TERM = 0
    COUNTERS = 1
    FIRST_PLANE = 2
    """For the hinge of its first channel, as are PLANES, FIRST_PIXEL and PIXELS; the next channel's first is ..."""
    PLANE_STEP = 3
    """... so many planes ..."""
    PIXEL_STEP = 4
    """... and so many pixels further on."""
    PLANES = 5
    FIRST_PIXEL = 6
    PIXELS = 7
    SHARE = 8
    """float64: its share of its joint's loss."""
    BINS = 9
    """Of each of its tables; 0 if its segments are sorted."""
    WORDS = 10
    """Where its first table begins among the words."""
    MAP = 11
    """Where the map of its tables' bins begins; for the hinge, of its first table's."""
    LIST = 12
    """Where the list of its first segment begins."""
    LIST_ROOM = 13
    """Elements of each segment's list."""
    FIRST_BUCKET = 14
    BUCKETS = 15
    """Of each segment."""
    RANKED_BELOW = 16
    """Segments of fewer foreground pixels than these have the pixels of their buckets ranked."""


class Segment(enum.IntEnum):
    """Of each segment; the host reads it."""

    STATE = 0
    LOSS = 1
    """In units of 2^(UNIT)."""
    UNIT = 2
    LARGEST = 3
    """If it is scored without foreground, in a table's stead: the greatest ``largest_error_key``."""
    FOREGROUND = 4
    VALID = 5
    """Foreground and background pixels."""
    WEIGHT = 6
    """float64: what the gradient is multiplied with."""


class Cross(enum.IntEnum):
    """Of each cross-entropy term and joint; the host reads it."""

    SUM = 0
    """Of the pixels' losses, in units of 2^(UNIT)."""
    UNIT = 1
    LARGEST = 2
    """The largest of them: the bits of a float32."""
    MEAN = 3
    """float64: 1 / the sum of the class weights of its pixels; 0 where nothing has weight."""


class SoftmaxCounter(enum.IntEnum):
    """Of each group, a row of K counters; int32."""

    PIXELS = 0
    INVERTED_LEAST = 1
    """The inverted bits of the smallest error of foreground, so that a maximum finds it."""


class HingeCounter(enum.IntEnum):
    """Of each group, a row of K counters; int32."""

    FOREGROUND = 0
    VALID = 1
    """Foreground and background pixels."""
    INVERTED_LEAST = 2
    LARGEST = 3
    """The bits of the largest error."""


class Outcome(enum.IntEnum):
    """Of each joint, a row of K counters; int32."""

    PREDICTED = 0
    HIT = 1


class Half(enum.IntEnum):
    """Of each table, as many words as it has bins."""

    BACKGROUND = 0
    FOREGROUND = 1


class Factor(enum.IntEnum):
    """Of each cross-entropy term; float64."""

    LABEL = 0
    """The term's weight x what the label's part of the target is multiplied with."""
    SPREAD = 1
    """The term's weight x what is spread over each class."""


class Scale(enum.IntEnum):
    """Of each joint and cross-entropy term; float32."""

    PULL = 0
    """What a pixel's class weight is multiplied with to be its pull."""
    SPREAD = 1
    """The spread of the smoothed part of the target."""


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

HINGE_FOREGROUND = tl.constexpr(HingeCounter.FOREGROUND.value)
HINGE_VALID = tl.constexpr(HingeCounter.VALID.value)
HINGE_LEAST = tl.constexpr(HingeCounter.INVERTED_LEAST.value)
HINGE_LARGEST = tl.constexpr(HingeCounter.LARGEST.value)
HINGE_COUNTERS = tl.constexpr(len(HingeCounter))

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
