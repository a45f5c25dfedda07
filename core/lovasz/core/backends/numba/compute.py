"""The Numba backend's entry point: runs compiled loops on the requests' tensors in place.

Four steps, each in parallel: errors and counts from logits and labels; the sums of cross-entropy; the segments of each
Lovász term (docs/mathematics.md, sections 7 and 11); the backward pass through softmax, in place. If a batch has
small joints that threads can share evenly, each thread does all four for one joint at a time (``whole``).
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lovasz.core.backends.numba import binary, entropy_terms, extension, softmax, whole
from lovasz.core.backends.numba.call import ROW_PADDING, Call, JointCounts
from lovasz.core.backends.numba.cross_entropy import CrossEntropies
from lovasz.core.backends.numba.extension import ErrorScale, Thresholds, score_term
from lovasz.core.backends.numba.outline import WholeOutline
from lovasz.core.backends.numba.scratch import SCRATCH
from lovasz.core.batch import Batch
from lovasz.core.computed import PROBABILITY_TOLERANCE, Computed, TermValues, Values
from lovasz.core.plan import Plan, Term
from lovasz.core.ranks import Ranks
from lovasz.core.scoring import select_segments
from lovasz.core.stop import Stop
from lovasz.spec import BinaryCrossEntropy, CrossEntropy, LovaszHinge, LovaszSigmoid, LovaszSoftmax

WHOLE_EXCESS = 1.25
"""Joints are computed by one thread each if the last thread ends after at most this multiple of the time in which all
would end if none were ever idle."""


def compute(
    plan: Plan,
    batch: Batch,
    *,
    want_grad: bool,
    want_total: bool = False,
    stop: Stop | None = None,
    thresholds: Thresholds | None = None,
    ranks: Ranks | None = None,
) -> Computed:
    """Computes a batch of any element type except float64; offers no ``Computed.total``.

    Args:
        ranks: the batch is this rank's part of a joint, one with images: the values are those of the whole joint, and
            the gradients those of the batch. If a rank has a fault, there are no values but the counts.

    Raises:
        Stopped: the computation was asked to end early.
    """
    scratch, chosen = SCRATCH.take(), thresholds or extension.THRESHOLDS
    most_threads = max(plan.pixels * plan.channels // chosen.thread, 1)
    call = Call(plan, batch, scratch, want_grad=want_grad, most_threads=most_threads, stop=stop, ranks=ranks)
    terms, counts = _terms(call, chosen)
    SCRATCH.give_back(scratch)
    values = Values(tuple(terms), counts.labels, counts.predictions, counts.hits, counts.faults)
    return Computed(call.grads_of_requests() if want_grad else None, lambda: values)


def _terms(call: Call, thresholds: Thresholds) -> tuple[list[TermValues], JointCounts]:
    if call.plan.is_binary:
        return _binary(call, thresholds)
    outline, is_alone = call.outline, call.ranks is None
    is_small = outline.largest < thresholds.pixels and outline.largest * call.plan.channels <= thresholds.whole
    if is_small and _is_even(call) and is_alone and not call.plan.loss.probabilities and outline.whole is not None:
        return _whole(call, outline.whole)
    return _softmax(call, thresholds)


def _is_even(call: Call) -> bool:
    """Whether threads that take whole joints, the largest first, end at about the same time."""
    largest, threads = call.outline.largest, call.threads
    share = call.plan.pixels / threads
    rounds = -(-len(call.plan.sizes) // threads)
    # Two bounds: in rounds of one joint per thread, each takes at most as long as the largest joint; and the last joint
    # begins before all others have ended.
    latest = min(rounds * largest, share + largest * (threads - 1) / threads)
    return latest <= WHOLE_EXCESS * share


class WholeArrays(NamedTuple):
    """What ``_whole`` gives to the compiled loop: the same in all calls with the same ``Call.arrays`` and threads.

    Attributes:
        arguments: of all threads.
        own: of each thread.
        entropies, scored, losses: of these, what the loop writes.
        cleared: arrays that have to be 0 at the start.
    """

    arguments: dict[str, Any]
    own: list[dict[str, Any]]
    entropies: CrossEntropies
    scored: npt.NDArray[np.bool_]
    losses: npt.NDArray[np.float64]
    cleared: list[npt.NDArray[Any]]

    @classmethod
    def of(cls, call: Call, outline: WholeOutline, threads: int) -> WholeArrays:
        plan, channels, pixels, array = call.plan, call.plan.channels, call.outline.largest, call.scratch.array
        entropies = entropy_terms.cross_entropies(call, with_losses=False)
        scored_planes = array("scored planes", (len(call.plan_planes), channels), np.bool_)
        losses = np.empty_like(outline.tables["factors"])
        scored = np.empty_like(losses, np.bool_)
        errors = array("errors", (threads, channels, pixels + ROW_PADDING), np.float32)
        codes = array("codes", (threads, 1, pixels), np.uint8)
        probability = array("label probability", (threads, pixels), np.float32)
        pixel_losses = array("pixel losses", (threads, len(plan.cross_entropies), pixels), np.float32)
        keys = array("keys", (threads, 2, pixels), np.uint64)
        room = array("room", (threads, pixels), np.float32)
        arguments = {
            **outline.tables,
            "blocks": call.outline.blocks,
            "planes": call.planes._replace(start=outline.start),
            "labelling": call.outline.labelling,
            "counts": call.counts,
            "entropies": entropies,
            "scored": scored,
            "scored_planes": scored_planes,
            "losses": losses,
        }
        own = [
            {
                "errors": errors[thread],
                "codes": codes[thread],
                "label_probability": probability[thread],
                "pixel_losses": pixel_losses[thread],
                "keys": keys[thread],
                "room": room[thread],
            }
            for thread in range(threads)
        ]
        cleared = [scored_planes, losses, entropies.largest, entropies.sums]
        return cls(arguments, own, entropies, scored, losses, cleared)


def _whole(call: Call, outline: WholeOutline) -> tuple[list[TermValues], JointCounts]:
    """A softmax loss of joints that are computed by one thread each."""
    threads = min(call.threads, len(call.plan.sizes))
    arrays = call.kept("whole", (call.arrays, threads), lambda: WholeArrays.of(call, outline, threads))
    for array in arrays.cleared:
        array.fill(0)
    call.run(
        whole.compute,
        threads=threads,
        want_grad=call.want_grad,
        logits_kind=call.logits_kind,
        own=arrays.own.__getitem__,
        **arrays.arguments,
    )
    of_joints, lovasz, numbers, terms = call.joint_counts(), iter(outline.groups), itertools.count(), []
    entropies, losses, scored = arrays.entropies, arrays.losses, arrays.scored
    for term in call.plan.terms:
        if isinstance(term.loss, CrossEntropy):
            terms.append(entropy_terms.values_of_cross_entropy(entropies, next(numbers)))
        elif isinstance(term.loss, LovaszSoftmax):
            own = next(lovasz)
            terms.append(TermValues(losses[own].T.copy(), scored[own].T.copy()))
        else:
            raise NotImplementedError(f"{term.loss.kind} as a softmax loss")
    return terms, of_joints


def _softmax(call: Call, thresholds: Thresholds) -> tuple[list[TermValues], JointCounts]:
    plan, labelling, codes = call.plan, call.outline.labelling, call.codes()
    inputs: dict[str, Any] = {"labelling": labelling, "errors": call.errors, "codes": codes[0]}
    entropies = entropy_terms.cross_entropies(call)
    probability = call.scratch.array("label probability", (plan.pixels,), np.float32)
    if plan.loss.probabilities:
        tolerance = np.float32(PROBABILITY_TOLERANCE)
        call.run_blocks(
            softmax.prepare_probabilities,
            logits_kind=call.logits_kind,
            tolerance=tolerance,
            counts=call.counts,
            **inputs,
        )
    else:
        inputs |= {"label_probability": probability, "entropies": entropies}
        call.run_blocks(softmax.prepare, logits_kind=call.logits_kind, counts=call.counts, **inputs)
    of_joints = call.joint_counts(maxima=[entropies.largest])
    if call.ranks is not None and of_joints.faults.any():
        return [], of_joints
    entropy_terms.add_cross_entropies(call, entropies, of_joints.labels)
    scored_planes = np.zeros((len(call.plan_planes), plan.channels), np.bool_)
    add, numbers = _prepare_grads(call), itertools.count()
    terms = []
    for term in plan.terms:
        if isinstance(term.loss, LovaszSoftmax):
            counts = call.per_plane(call.counts.labels) if term.per_image else of_joints.labels
            nearest = None if plan.loss.probabilities or call.ranks is not None else call.nearest(term)
            ignored = call.outline.ignored_code(term)
            if ignored != labelling.void:
                counts = counts.copy()
                counts[ignored] = 0
            terms.append(_score(call, term, counts, counts, codes, add, scored_planes, thresholds, nearest=nearest))
        elif isinstance(term.loss, CrossEntropy):
            terms.append(entropy_terms.values_of_cross_entropy(entropies, next(numbers)))
        else:
            raise NotImplementedError(f"{term.loss.kind} as a softmax loss")
    if call.want_grad and plan.loss.probabilities:
        call.clear_grads(scored_planes)
    elif call.want_grad:
        call.run_blocks(softmax.finish, scored=scored_planes, **inputs)
    return terms, of_joints


def _binary(call: Call, thresholds: Thresholds) -> tuple[list[TermValues], JointCounts]:
    plan, codes, largest = call.plan, call.codes(), np.zeros((2, len(call.valid)), np.int64)
    entropies = entropy_terms.binary_cross_entropies(call)
    inputs: dict[str, Any] = {
        "logits_kind": call.logits_kind,
        "labelling": call.outline.labelling,
        "is_sigmoid": plan.is_sigmoid,
        "entropies": entropies,
        "codes": codes,
    }
    call.run_blocks(
        binary.prepare,
        channels=plan.channels,
        errors=call.errors,
        counts=call.counts,
        valid=call.valid,
        positive=call.positive,
        largest=largest[0],
        largest_foreground=largest[1],
        **inputs,
    )
    # Of all counted pixels, and of foreground alone: terms that ignore the background have a scale of their own.
    of_planes = np.stack([call.per_plane(row) for row in largest])
    largest_of_joints = np.maximum.reduceat(of_planes, call.plan_planes.joints.first_plane, axis=2)
    of_joints = call.joint_counts(maxima=[largest_of_joints, entropies.largest])
    if call.ranks is not None and of_joints.faults.any():
        return [], of_joints
    scored_planes = np.zeros((len(call.plan_planes), plan.channels), np.bool_)
    add, numbers = _prepare_grads(call), itertools.count()
    terms = []
    for term in plan.terms:
        foreground, counted = of_joints.labels, of_joints.valid
        ignored = call.outline.ignored_code(term)
        which = 1 if ignored == 0 else 0
        scale = ErrorScale(largest_of_joints[which], of_joints.positive)
        if term.per_image:
            foreground, counted = call.per_plane(call.counts.labels), call.per_plane(call.valid)
            scale = ErrorScale(of_planes[which], call.per_plane(call.positive))
        if ignored == 1:
            counted, foreground = counted - foreground, np.zeros_like(foreground)
        elif ignored == 0:
            counted = foreground
        if isinstance(term.loss, BinaryCrossEntropy):
            terms.append(
                entropy_terms.values_of_binary_cross_entropy(
                    call, term, next(numbers), entropies, counted.sum(0), codes
                )
            )
        elif isinstance(term.loss, LovaszHinge | LovaszSigmoid):
            terms.append(_score(call, term, counted, foreground, codes, add, scored_planes, thresholds, scale))
        else:
            raise NotImplementedError(f"{term.loss.kind} as a binary loss")
    if call.want_grad and (plan.is_sigmoid or plan.binary_cross_entropies):
        call.run_blocks(binary.finish, scored=scored_planes, **inputs)
    elif call.want_grad:
        call.clear_grads(scored_planes)
    return terms, of_joints


def _prepare_grads(call: Call) -> bool:
    """Clears the gradients if several terms will add to them; returns whether they will."""
    several = len(call.plan.lovasz) > 1
    if several and call.want_grad:
        call.clear_grads()
    return several


def _score(
    call: Call,
    term: Term,
    counted: npt.NDArray[np.int64],
    foreground: npt.NDArray[np.int64],
    codes: npt.NDArray[Any],
    add: bool,
    scored_planes: npt.NDArray[np.bool_],
    thresholds: Thresholds,
    scale: ErrorScale | None = None,
    nearest: npt.NDArray[np.int64] | None = None,
) -> TermValues:
    """Scores a Lovász term, and marks the rows (classes) of each plane that get a gradient.

    Args:
        counted: the ``counts`` of ``select_segments``.
        foreground, scale, nearest: as for ``score_term``.
        scored_planes: bool, shape (planes, K); set to true where the term scores the plane's segment.
    """
    scored, weights = select_segments(term, counted, call.factors(term), term.listed)
    losses = score_term(call, term, scored, weights, foreground, codes, add, thresholds, scale, nearest)
    scored_planes |= scored.T.take(call.outline.of_term(term).group_of_planes, 0)
    if call.ranks is None or not term.per_image:
        return TermValues(losses, scored)
    losses_of_ranks, scored_of_ranks = call.ranks.gather(losses.T.ravel()), call.ranks.gather(scored.T.ravel())
    return TermValues(
        np.concatenate(losses_of_ranks).reshape(-1, len(losses)).T.copy(),
        np.concatenate(scored_of_ranks).reshape(-1, len(losses)).T.copy(),
    )
