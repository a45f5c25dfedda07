"""Small joints, each computed from logits to gradients by one thread: their scratch stays in the processor's cache."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lovasz.core.backends.numba import cross_entropy, softmax
from lovasz.core.backends.numba.cross_entropy import CrossEntropies
from lovasz.core.backends.numba.intrinsics import compiled
from lovasz.core.backends.numba.planes import Blocks, Floats, Integers, Labelling, Planes, claim
from lovasz.core.backends.numba.segments import Rules, Segments, sort_segment
from lovasz.core.backends.numba.softmax import Counts
from lovasz.core.backends.numba.sorting import Keys

Flags = npt.NDArray[np.bool_]


class Joints(NamedTuple):
    """Tasks of the loop: the joints of a batch, int64.

    Attributes:
        order: the joints, those with most pixels first; the other arrays have one element per joint.
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


class Terms(NamedTuple):
    """The L Lovász-Softmax terms of a loss; their segments are in the order of terms, groups and classes.

    Attributes:
        first_group: int64, (L,): the first group of the term among the groups of all terms.
        per_image: bool, (L,): whether its groups are planes; otherwise they are joints.
        ignored: int64, (L,): ``TermOutline.ignored``.
        is_listed: bool, (L,): whether ``listed`` says which classes are scored; otherwise those that are present.
        listed: bool, (L, K).
        factors: float64, (segments,): ``TermOutline.factors``.
    """

    first_group: Integers
    per_image: Flags
    ignored: Integers
    is_listed: Flags
    listed: Flags
    factors: npt.NDArray[np.float64]


@compiled
def compute(
    tasks: Integers,
    joints: Joints,
    terms: Terms,
    segments: Segments,
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
    keys: Keys,
    other_keys: Keys,
    room: Floats,
) -> None:
    """Computes joints of a softmax loss whose segments are all sorted.

    ``planes.start`` and the segments' pixels count from the first pixel of their joint.

    Args:
        segments: of all terms; ``foreground_count``, ``weight`` and ``foreground_weight`` are written.
        scored: bool, (segments,), written: whether a segment is scored.
        scored_planes: bool, (planes, K), false; written: the rows that get a gradient.
        losses: float64, (segments,), written: the losses of those that are scored.
        errors, codes, label_probability, pixel_losses, keys, other_keys, room: memory for this thread alone, of the
            largest joint; see ``softmax.prepare``, ``CrossEntropies.losses`` and ``segments.score``.
    """
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
            rules = Rules(void, terms.ignored[term], False, want_grad, add, np.inf)
            first_group, stop_group = joint, joint + 1
            if terms.per_image[term]:
                first_group, stop_group = first_plane, stop_plane
            for group in range(terms.first_group[term] + first_group, terms.first_group[term] + stop_group):
                _select(segments, terms, term, group * channels, counts, labels, scored, scored_planes)
                for s in range(group * channels, (group + 1) * channels):
                    if scored[s]:
                        losses[s] = sort_segment(segments, s, rules, planes, errors, codes, keys, other_keys, room)
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
def _select(
    segments: Segments,
    terms: Terms,
    term: int,
    first: int,
    counts: Counts,
    labels: Integers,
    scored: Flags,
    scored_planes: Flags,
) -> None:
    """Decides which segments of a group a term scores, and their weights, as ``scoring.select_segments`` does.

    Args:
        first: the group's first segment.
        labels: memory for K counts.
    """
    channels, first_plane, stop_plane = len(labels), segments.first_plane[first], segments.stop_plane[first]
    _add_labels(counts, first_plane, stop_plane, terms.ignored[term], labels)
    has_pixels, classes = labels.sum() > 0, 0
    for k in range(channels):
        is_scored = has_pixels and terms.listed[term, k] if terms.is_listed[term] else labels[k] > 0
        scored[first + k] = is_scored
        classes += 1 if is_scored else 0
    for k in range(channels):
        if scored[first + k]:
            weight = terms.factors[first + k] / classes
            segments.foreground_count[first + k] = labels[k]
            segments.weight[first + k] = segments.foreground_weight[first + k] = weight
            for plane in range(first_plane, stop_plane):
                scored_planes[plane, k] = True
