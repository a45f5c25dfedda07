"""The part of a computation that its plan alone decides: made once, and kept with the plan for batches of its kind."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from lovasz.core.backends.numba.binary import BinaryCrossEntropies
from lovasz.core.backends.numba.cross_entropy import CrossEntropies
from lovasz.core.backends.numba.fixed_point import sum_bits
from lovasz.core.backends.numba.planes import FLOAT32, FLOAT_BYTES, LABEL_BYTES, Blocks, Integers, Labelling
from lovasz.core.backends.numba.segments import Segments
from lovasz.core.backends.numba.whole import Groups, Joints, Terms
from lovasz.core.plan import FUSE_BELOW_PIXELS, Plan, Term
from lovasz.core.scoring import segment_factors

BLOCK_PIXELS = 1 << 14
"""The most pixels per task. Each task costs an atomic claim and atomic additions to the counts."""

BLOCK_MULTIPLE = 64
"""Blocks begin at multiples of this."""

MOST_BYTE = 255
"""Codes up to this are bytes."""

KEPT_TYPES = 4
"""The most combinations of element types that are kept with a plan. Requests of one training have one or two."""

KEPT_SEGMENTS = 1 << 10
"""Plans with more segments, those of all terms, keep none: each takes about a hundred bytes."""

WHOLE_SEGMENTS = 1 << 12
"""The most segments, those of all terms, of batches whose joints are computed by one thread each."""


@dataclass(frozen=True, eq=False)
class TermOutline:
    """What is known of a Lovász term without counts.

    Attributes:
        segments: all its segments, those of the largest groups first, so that threads end together. The columns that
            depend on counts are those of segments without foreground or weight.
        places: the place of each segment in arrays (K, groups), counted from their first element.
        largest: the number of pixels of the largest group.
        group_of_planes: the group of each plane.
        ignored: the code that is void for this term, but not for all terms; ``labelling.void`` if there is none.
        factors: the result of ``segment_factors``.
    """

    segments: Segments
    places: Integers
    largest: int
    group_of_planes: Integers
    ignored: int
    factors: npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class WholeOutline:
    """What is known of joints that one thread computes each.

    Attributes:
        tables: arguments of ``whole.compute``.
        start: the first pixel of each plane, counted from the first pixel of its joint.
        groups: the groups of each Lovász term among those of all.
    """

    tables: dict[str, npt.NDArray[Any]]
    start: Integers
    groups: list[slice]


@dataclass(frozen=True, eq=False)
class TypeOutline:
    """What is known of a batch with its element types.

    Attributes:
        are_points: one per request: whether it is a point cloud whose classes stay last. Only float32 is read so.
        transposed: one per request: whether its logits have to be transposed.
        transposed_labels: likewise its labels.
        offsets: int64, (4, planes): the offsets in bytes of each plane's logits, labels and gradient in the tensors of
            its request; the last row, for ``Planes.points``, is 0.
        label_kind: int64, one per plane: the element type of its labels.
        plane_points: bool, one per plane: ``are_points`` of its request.
    """

    are_points: list[bool]
    transposed: list[bool]
    transposed_labels: list[bool]
    offsets: Integers
    label_kind: Integers
    plane_points: npt.NDArray[np.bool_]


class Outline:
    """What compiled loops need to know of a batch, apart from its tensors and counts.

    Attributes:
        planes: the planes; images of few pixels are fused.
        request: the request of each plane, as an index.
        blocks: the tasks of loops over pixels.
        labelling: how labels become codes.
        largest: the number of pixels of the largest joint.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.planes = plan.planes(FUSE_BELOW_PIXELS)
        is_one_each = len(self.planes) == len(plan.layouts)
        self.request: slice | Integers = slice(None) if is_one_each else self.planes.request
        self.blocks = _blocks(self.planes.pixels)
        values, common = plan.label_values, plan.rules[0] if len(plan.rules) == 1 else None
        self.labelling = Labelling(values, values, 0 if common is None else common, common is not None)
        self.largest = int(self.planes.joints.pixels.max())
        self._of_terms: dict[Term, TermOutline] = {}
        self._of_types: dict[tuple[int, ...], TypeOutline] = {}

    def of_types(self, kinds: tuple[int, ...]) -> TypeOutline:
        """What element types decide.

        Args:
            kinds: that of all logits and those of each request's labels, as in ``planes``.
        """
        known = self._of_types.get(kinds)
        if known is None:
            known = self._make_of_types(kinds[0], np.array(kinds[1:]))
            if len(self._of_types) >= KEPT_TYPES:
                self._of_types.clear()  # In one step, since other threads may use the same outline.
            self._of_types[kinds] = known
        return known

    def _make_of_types(self, logits_kind: int, label_kinds: Integers) -> TypeOutline:
        plan, planes, fused = self._plan, self.planes, self.planes.fused
        has_points = logits_kind == FLOAT32 and not (plan.is_binary or plan.loss.probabilities)
        are_points = fused & [layout.pixels == 1 and has_points for layout in plan.layouts]
        label_kind, grad_bytes = label_kinds[self.request], np.float32().itemsize
        labels = planes.labels * np.array(LABEL_BYTES)[label_kind]
        logits, points = planes.logits * FLOAT_BYTES[logits_kind], np.zeros_like(planes.logits)
        return TypeOutline(
            are_points=are_points.tolist(),
            transposed=(fused & ~are_points).tolist(),
            transposed_labels=(fused & plan.is_binary).tolist(),
            offsets=np.stack([logits, labels, planes.logits * grad_bytes, points]),
            label_kind=label_kind,
            plane_points=are_points[self.request],
        )

    def ignored_code(self, term: Term) -> int:
        """``TermOutline.ignored`` of a term of any kind."""
        index = term.loss.ignore_index
        return self.labelling.void if index is None or not 0 <= index < self.labelling.values else index

    def of_term(self, term: Term) -> TermOutline:
        known = self._of_terms.get(term)
        if known is None:
            known = self._make(term)
            if len(known.places) * len(self._plan.lovasz) <= KEPT_SEGMENTS:
                self._of_terms[term] = known
        return known

    def _make(self, term: Term) -> TermOutline:
        groups, channels, is_binary = self.planes.groups(term), self._plan.channels, self._plan.is_binary
        count = len(groups.pixels)
        group = np.repeat(np.argsort(-groups.pixels, kind="stable"), channels)
        row = np.tile(np.arange(channels), count)
        zeros, weightless = np.zeros_like(row), np.zeros(len(row))
        segments = Segments(
            smallest=np.full_like(row, -1),
            counted=np.zeros(len(row), np.bool_),
            row=row,
            code_row=row if is_binary else zeros,
            foreground=np.ones_like(row) if is_binary else row,
            foreground_count=zeros,
            first_plane=groups.first_plane[group],
            stop_plane=(groups.first_plane + groups.planes)[group],
            start=groups.start[group],
            stop=(groups.start + groups.pixels)[group],
            top=zeros,
            fine_top=zeros,
            few=zeros,
            most_error=weightless,
            weight=weightless,
            foreground_weight=weightless,
        )
        return TermOutline(
            segments,
            places=row * count + group,
            largest=int(groups.pixels.max()),
            group_of_planes=np.arange(count) if term.per_image else self.planes.joint,
            ignored=self.ignored_code(term),
            factors=segment_factors(term, groups.share, term.class_weights),
        )

    @cached_property
    def whole(self) -> WholeOutline | None:
        """For softmax losses with Lovász terms; None for others, and with too many classes or segments.

        Codes of many classes do not fit in a byte: loops for them would have to be compiled, too.
        """
        plan, joints, lovasz = self._plan, self.planes.joints, self._plan.lovasz
        groups_of = [self.planes.groups(term) for term in lovasz]
        ends = np.cumsum([0, *(len(groups.pixels) for groups in groups_of)])
        if plan.is_binary or self.labelling.void > MOST_BYTE or not 0 < ends[-1] * plan.channels <= WHOLE_SEGMENTS:
            return None
        edges = np.stack([joints.first_plane, joints.first_plane + joints.planes])
        groups_table = []
        for groups in groups_of:
            start = groups.start - joints.start[self.planes.joint[groups.first_plane]]
            stop_plane = groups.first_plane + groups.planes
            groups_table.append(Groups(groups.first_plane, stop_plane, start, start + groups.pixels))
        factors = [
            segment_factors(term, g.share, term.class_weights) for term, g in zip(lovasz, groups_of, strict=True)
        ]
        order = np.argsort(-joints.pixels, kind="stable")
        listed = [np.zeros(plan.channels, np.bool_) if term.listed is None else term.listed for term in lovasz]
        return WholeOutline(
            tables={
                "joint_table": np.stack(
                    Joints(order, *edges, *np.searchsorted(self.blocks.plane, edges), joints.pixels, self.sum_bits)
                ),
                "term_table": np.stack(
                    Terms(
                        first_group=ends[:-1],
                        per_image=np.array([term.per_image for term in lovasz], np.int64),
                        ignored=np.array([self.ignored_code(term) for term in lovasz], np.int64),
                        is_listed=np.array([term.listed is not None for term in lovasz], np.int64),
                    )
                ),
                "group_table": np.concatenate(groups_table, axis=1),
                "listed": np.array(listed),
                # In order "C", since loops are compiled for contiguous rows; so are arrays that are made like it.
                "factors": np.ascontiguousarray(np.concatenate(factors, axis=1).T),
            },
            start=self.planes.start - joints.start[self.planes.joint],
            groups=[slice(first, stop) for first, stop in itertools.pairwise(ends.tolist())],
        )

    @cached_property
    def cross_entropies(self) -> CrossEntropies:
        """The cross-entropy terms, with room for neither pixels nor joints."""
        terms, void = self._plan.cross_entropies, self.labelling.void
        weights, counted = np.zeros((2, len(terms), void + 1), np.float32)
        for t, term in enumerate(terms):
            weights[t, :void] = term.class_weights
            counted[t, :void] = 1.0
            counted[t, self.ignored_code(term)] = 0.0
        factors = np.array([(term.label_smoothing, term.label_factor, term.spread_factor) for term in terms])
        smoothing, label_factor, spread_factor = factors.reshape(-1, 3).T.copy()
        no_floats, no_doubles, no_integers = (
            np.empty((len(terms), 0), dtype) for dtype in (np.float32, np.float64, np.int64)
        )
        return CrossEntropies(
            weights=weights,
            counted=counted,
            smoothing=smoothing.astype(np.float32),
            class_weights=np.array([term.class_weights for term in terms]).reshape(len(terms), void),
            label_factor=label_factor,
            spread_factor=spread_factor,
            losses=no_floats,
            largest=no_integers.ravel(),
            scale=no_doubles,
            sums=no_integers.ravel(),
            mean=no_doubles,
            pull=no_floats,
            spread=no_floats,
        )

    @cached_property
    def sum_bits(self) -> Integers:
        """``fixed_point.sum_bits`` of the sum over each joint's pixels: int64, (joints,)."""
        return sum_bits(self.planes.joints.pixels)

    @cached_property
    def binary_cross_entropies(self) -> BinaryCrossEntropies:
        """The binary cross-entropy terms, with room for neither pixels nor joints."""
        terms = self._plan.binary_cross_entropies
        return BinaryCrossEntropies(
            ignored=np.array([self.ignored_code(term) for term in terms], np.int64),
            pos_weight=np.array([term.pos_weight for term in terms]).reshape(len(terms), self._plan.channels),
            losses=np.empty((0, 0), np.float32),
            largest=np.zeros(len(self._plan.sizes), np.int64),
            factor=np.empty((len(terms), 0)),
        )


def _blocks(pixels: Integers) -> Blocks:
    """Divides each plane into blocks of about the same size, so that threads end together."""
    count = -(-pixels // BLOCK_PIXELS)
    plane = np.repeat(np.arange(len(pixels)), count)
    size = -(-pixels // (count * BLOCK_MULTIPLE))[plane] * BLOCK_MULTIPLE
    first = (np.arange(len(plane)) - np.repeat(np.cumsum(count) - count, count)) * size
    return Blocks(plane, np.minimum(first, pixels[plane]), np.minimum(first + size, pixels[plane]))
