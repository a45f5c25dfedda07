"""Small joints, each computed from logits to gradients by one thread: their scratch stays in the processor's cache."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lovasz.core.backends.numba import cross_entropy, softmax
from lovasz.core.backends.numba.cross_entropy import CrossEntropies
from lovasz.core.backends.numba.intrinsics import compiled
from lovasz.core.backends.numba.keys import MOST
from lovasz.core.backends.numba.planes import Blocks, Floats, Integers, Labelling, Planes, claim
from lovasz.core.backends.numba.segments import Rules, Segment, WindowRules, sort_segment
from lovasz.core.backends.numba.softmax import Counts

Flags = npt.NDArray[np.bool_]


class Joints(NamedTuple):
    """The joints of a batch, int64: each column is a row of an array that ``compute`` gets.

    Attributes:
        order: the joints, those with most pixels first; the other columns have one element per joint.
        first_plane, stop_plane: its planes are [first_plane, stop_plane).
        first_block, stop_block: its blocks are [first_block, stop_block).
        pixels: the number of its pixels.
        sum_bits: ``fixed_point.sum_bits`` of this number.
    """

    order: Integers
    first_plane: Integers
    stop_plane: Integers
    first_block: Integers
    stop_block: Integers
    pixels: Integers
    sum_bits: Integers


class Groups(NamedTuple):
    """The groups of all Lovász-Softmax terms, int64.

    Attributes:
        first_plane, stop_plane: its planes are [first_plane, stop_plane).
        start, stop: its pixels, counted from the first pixel of its joint, are [start, stop).
    """

    first_plane: Integers
    stop_plane: Integers
    start: Integers
    stop: Integers


class Terms(NamedTuple):
    """The L Lovász-Softmax terms of a loss, int64.

    Attributes:
        first_group: the first of its groups.
        per_image: 1 if its groups are planes, 0 if they are joints.
        ignored: ``TermOutline.ignored``.
        is_listed: 1 if it scores the classes that it lists, 0 if it scores those that are present.
    """

    first_group: Integers
    per_image: Integers
    ignored: Integers
    is_listed: Integers


@compiled
def compute(
    tasks: Integers,
    joint_table: npt.NDArray[np.int64],
    term_table: npt.NDArray[np.int64],
    group_table: npt.NDArray[np.int64],
    listed: Flags,
    factors: npt.NDArray[np.float64],
    want_grad: bool,
    blocks: Blocks,
    planes: Planes,
    logits_kind: int,
    labelling: Labelling,
    counts: Counts,
    entropies: CrossEntropies,
    scored: Flags,
    scored_planes: Flags,
    losses: npt.NDArray[np.float64],
    errors: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    label_probability: Floats,
    pixel_losses: npt.NDArray[np.float32],
    keys: npt.NDArray[np.uint64],
    room: Floats,
) -> None:
    """Computes joints of a softmax loss whose segments are all sorted.

    Args:
        joint_table, term_table, group_table: the columns of ``Joints``, ``Terms`` and ``Groups``.
        listed: bool, (L, K): the classes that a term lists.
        factors: float64, (groups, K): ``TermOutline.factors``.
        planes: with ``start`` counted from the first pixel of the plane's joint.
        scored: bool, (groups, K), written: whether a segment is scored.
        scored_planes: bool, (planes, K), false; written: the rows that get a gradient.
        losses: float64, (groups, K), written: the losses of the segments that are scored.
        errors, codes, label_probability, pixel_losses, keys, room: memory for this thread alone, of the largest joint;
            see ``softmax.prepare``, ``CrossEntropies.losses`` and ``undivided.score`` (which has two arrays of keys).
    """
    table = joint_table
    joints = Joints(table[0], table[1], table[2], table[3], table[4], table[5], table[6])
    terms = Terms(term_table[0], term_table[1], term_table[2], term_table[3])
    groups = Groups(group_table[0], group_table[1], group_table[2], group_table[3])
    channels, void = labelling.values, labelling.void
    own_tasks, labels = np.zeros(1, np.int64), np.empty(channels, np.int64)
    entropies = _with_losses(entropies, pixel_losses)
    while True:
        task = claim(tasks, len(joints.order))
        if task >= len(joints.order):
            break
        joint = joints.order[task]
        own = _part(blocks, joints.first_block[joint], joints.stop_block[joint])
        first_plane, stop_plane = joints.first_plane[joint], joints.stop_plane[joint]
        own_tasks[0] = 0
        softmax.prepare(
            own_tasks,
            own,
            planes,
            logits_kind,
            labelling,
            errors,
            codes[0],
            label_probability,
            entropies,
            counts,
        )
        if len(entropies.smoothing) > 0:
            _add_labels(counts, first_plane, stop_plane, void, labels)
            cross_entropy.set_factors(entropies, joint, labels, joints.pixels[joint], joints.sum_bits[joint])
            own_tasks[0] = 0
            cross_entropy.add_losses(own_tasks, own, planes, entropies)
        add = want_grad and len(terms.ignored) > 1
        if add:
            softmax.clear(planes, first_plane, stop_plane, channels)
        for term in range(len(terms.ignored)):
            rules = Rules(void, terms.ignored[term], False, want_grad, add, False, WindowRules(False, False, 0, False))
            first_group, stop_group = joint, joint + 1
            if terms.per_image[term] != 0:
                first_group, stop_group = first_plane, stop_plane
            for group in range(terms.first_group[term] + first_group, terms.first_group[term] + stop_group):
                first, stop = groups.first_plane[group], groups.stop_plane[group]
                _add_labels(counts, first, stop, terms.ignored[term], labels)
                classes = _select(labels, terms.is_listed[term], listed[term], scored[group])
                for k in range(channels):
                    if scored[group, k]:
                        scored_planes[first:stop, k] = True
                        weight = factors[group, k] / classes
                        segment = Segment(
                            smallest=_smallest(counts, first, stop, channels, k),
                            row=k,
                            code_row=0,
                            foreground=k,
                            foreground_count=labels[k],
                            first_plane=first,
                            stop_plane=stop,
                            start=groups.start[group],
                            stop=groups.stop[group],
                            weight=weight,
                            foreground_weight=weight,
                        )
                        losses[group, k] = sort_segment(segment, rules, planes, errors, codes, keys[0], keys[1], room)
        if want_grad:
            own_tasks[0] = 0
            softmax.finish(
                own_tasks, own, planes, labelling, errors, codes[0], label_probability, entropies, scored_planes
            )


@compiled
def _part(blocks: Blocks, first: int, stop: int) -> Blocks:
    return Blocks(blocks.plane[first:stop], blocks.first[first:stop], blocks.last[first:stop])


@compiled
def _with_losses(entropies: CrossEntropies, losses: npt.NDArray[np.float32]) -> CrossEntropies:
    return CrossEntropies(
        entropies.weights,
        entropies.counted,
        entropies.smoothing,
        entropies.class_weights,
        entropies.label_factor,
        entropies.spread_factor,
        losses,
        entropies.largest,
        entropies.scale,
        entropies.sums,
        entropies.mean,
        entropies.pull,
        entropies.spread,
    )


@compiled
def _add_labels(counts: Counts, first_plane: int, stop_plane: int, ignored: int, labels: Integers) -> None:
    """Writes the number of pixels of each class in the planes; 0 for the class that is ignored."""
    channels = len(labels)
    labels[:] = 0
    for plane in range(first_plane, stop_plane):
        for k in range(channels):
            labels[k] += counts.labels[plane * channels + k] if k != ignored else 0


@compiled
def _smallest(counts: Counts, first_plane: int, stop_plane: int, channels: int, k: int) -> int:
    """The bits of the smallest error of a class's own pixels in the planes."""
    nearest = np.int64(0)
    for plane in range(first_plane, stop_plane):
        nearest = max(nearest, counts.nearest[plane * channels + k])
    return np.int64(MOST) - nearest


@compiled
def _select(labels: Integers, is_listed: int, listed: Flags, scored: Flags) -> int:
    """Decides which segments of a group are scored, as ``scoring.select_segments`` does; returns how many.

    Args:
        labels: the pixels of each class.
        scored: written.
    """
    has_pixels, classes = labels.sum() > 0, 0
    for k in range(len(labels)):
        scored[k] = has_pixels and listed[k] if is_listed != 0 else labels[k] > 0
        classes += 1 if scored[k] else 0
    return classes
