"""What all backends take from the plan of a batch: planes, groups, shares, rules and terms."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from lovasz.core.batch import Batch, Request
from lovasz.core.dispatch import submit
from lovasz.core.plan import FUSE_ALL, FUSE_BELOW_PIXELS, KEPT_IMAGES, KEPT_PLANS, KEPT_WEIGHTS, Plan
from lovasz.core.scoring import segment_factors, select_segments
from lovasz.spec import CrossEntropy, LossLike, LovaszHinge, LovaszSoftmax, Result, weighted_sum

CPU = torch.device("cpu")
SHAPES = ((2, 3, 4, 5), (1, 3, 6, 2), (3, 3, 7))
SIZES = (1, 2)
JOINT_LOSS: LossLike = [(1.0, LovaszSoftmax()), (1.0, CrossEntropy())]


def batch_of(loss: LossLike, shapes: Sequence[tuple[int, ...]] = SHAPES, sizes: Sequence[int] = SIZES) -> Batch:
    total = weighted_sum(loss)
    requests = []
    for shape in shapes:
        labels = torch.zeros(shape if total.is_binary else (shape[0], *shape[2:]), dtype=torch.uint8)
        requests.append(Request.checked(torch.zeros(shape), labels, total))
    return Batch.of(requests, sizes)


def plan_of(loss: LossLike) -> Plan:
    return Plan.of(batch_of(loss), weighted_sum(loss), CPU)


def test_planes_are_images_in_the_order_of_the_batch() -> None:
    planes = plan_of(LovaszSoftmax()).planes(0)
    assert planes.request.tolist() == [0, 0, 1, 2, 2, 2]
    assert planes.joint.tolist() == [0, 0, 1, 1, 1, 1]
    assert planes.pixels.tolist() == planes.image_pixels.tolist() == [20, 20, 12, 7, 7, 7]
    assert planes.start.tolist() == [0, 20, 40, 52, 59, 66]
    assert planes.logits.tolist() == [0, 60, 0, 0, 21, 42]
    assert planes.labels.tolist() == [0, 20, 0, 0, 7, 14]
    assert planes.of_joint.tolist() == [2, 4]


def test_labels_of_a_hinge_are_laid_out_as_its_logits() -> None:
    planes = plan_of(LovaszHinge(multilabel=True)).planes(0)
    assert planes.labels.tolist() == planes.logits.tolist() == [0, 60, 0, 0, 21, 42]


@pytest.mark.parametrize(
    ("fuse_below", "fused", "pixels"),
    [(0, [], [20, 20, 12, 7, 7, 7]), (8, [2], [20, 20, 12, 21]), (FUSE_ALL, [0, 2], [40, 12, 21])],
)
def test_images_below_a_size_are_fused(fuse_below: int, fused: list[int], pixels: list[int]) -> None:
    planes = plan_of(JOINT_LOSS).planes(fuse_below)
    assert np.flatnonzero(planes.fused).tolist() == fused
    assert planes.pixels.tolist() == pixels
    assert planes.joints.pixels.tolist() == [40, 33]


def test_images_that_a_term_scores_on_their_own_are_not_fused() -> None:
    plan = plan_of([(1.0, LovaszSoftmax()), (1.0, LovaszSoftmax(per_image=True)), (2.0, CrossEntropy())])
    planes = plan.planes(FUSE_ALL)
    assert not planes.fused.any()
    assert [term.per_image for term in plan.terms] == [False, True, False]
    joints, images = (planes.groups(term) for term in plan.terms[:2])
    assert joints.pixels.tolist() == [40, 33]
    assert joints.planes.tolist() == [2, 4]
    assert joints.share.tolist() == [1, 1]
    assert images.pixels.tolist() == [20, 20, 12, 7, 7, 7]
    assert images.start.tolist() == planes.start.tolist()
    assert images.share.tolist() == [1 / 2] * 2 + [1 / 4] * 4
    assert plan.images == (2, 4)


def test_each_rule_stands_once_whatever_the_number_of_its_terms() -> None:
    plan = plan_of([(1.0, LovaszSoftmax(ignore_index=9)), (1.0, LovaszSoftmax()), (1.0, CrossEntropy(ignore_index=9))])
    assert plan.rules == (9, None)
    assert [term.rule for term in plan.terms] == [0, 1, 0]


def test_terms_carry_their_options() -> None:
    plan = plan_of(
        [
            (2.0, LovaszSoftmax(classes=[2, 0], class_weights=[1, 2, 3])),
            (1.0, LovaszSoftmax(classes="all")),
            (3.0, CrossEntropy(label_smoothing=0.25)),
        ]
    )
    listed, everything, entropy = plan.terms
    assert listed.listed is not None
    assert listed.listed.tolist() == [True, False, True]
    assert listed.class_weights.tolist() == [1, 2, 3]
    assert everything.listed is not None
    assert everything.listed.all()
    assert entropy.class_weights.tolist() == [1, 1, 1]
    assert (entropy.label_factor, entropy.spread_factor) == (2.25, 0.25)
    assert plan.lovasz == (listed, everything)
    assert plan.cross_entropies == (entropy,)


def test_segments_are_selected_alike_on_arrays_and_tensors() -> None:
    counts = np.array([[3, 0], [0, 0], [2, 0]])
    share = np.array([1.0, 0.5])
    for loss in (LovaszSoftmax(), LovaszSoftmax("all"), LovaszSoftmax([1], class_weights=[1, 4, 2]), LovaszHinge()):
        kind = loss if isinstance(loss, LovaszSoftmax) else LovaszHinge(multilabel=True)
        (term,) = plan_of([(2.0, kind)]).terms
        arrays = counts, segment_factors(term, share, term.class_weights), term.listed
        scored, weights = select_segments(term, *arrays)
        tensors = [None if array is None else torch.from_numpy(array) for array in arrays]
        of_tensors = select_segments(term, *tensors)
        assert of_tensors[0].tolist() == scored.tolist()
        assert of_tensors[1].tolist() == weights.tolist()
        if isinstance(loss, LovaszSoftmax):
            assert not scored[:, 1].any()  # a void group
            assert not weights[~scored].any()
    (term,) = plan_of([(2.0, LovaszSoftmax([1], class_weights=[1, 4, 2]))]).terms
    scored, weights = select_segments(term, counts, segment_factors(term, share, term.class_weights), term.listed)
    assert weights.tolist() == [[0, 0], [8, 0], [0, 0]]


def test_a_plan_that_comes_again_is_the_same_one_unless_it_is_large() -> None:
    total = weighted_sum(JOINT_LOSS)
    assert Plan.of(batch_of(total), total, CPU) is Plan.of(batch_of(total), total, CPU)
    assert Plan.of(batch_of(total), total, CPU) is not Plan.of(batch_of(total, sizes=(2, 1)), total, CPU)
    images = (KEPT_IMAGES + 1, 3, FUSE_BELOW_PIXELS)
    for shapes in ([images], [(1, KEPT_WEIGHTS // 2 + 1)], [(1, 3)] * (KEPT_IMAGES + 1)):  # Two terms.
        large = batch_of(total, shapes, [len(shapes)])
        assert Plan.of(large, total, CPU) is not Plan.of(large, total, CPU)


def test_a_point_cloud_is_a_small_plan_unless_each_point_is_scored_as_an_image() -> None:
    joint, images = weighted_sum(JOINT_LOSS), weighted_sum(LovaszSoftmax(per_image=True))
    cloud = [(100 * KEPT_IMAGES, 3)]
    assert Plan.of(batch_of(joint, cloud, [1]), joint, CPU) is Plan.of(batch_of(joint, cloud, [1]), joint, CPU)
    assert Plan.of(batch_of(images, cloud, [1]), images, CPU) is not Plan.of(batch_of(images, cloud, [1]), images, CPU)


def test_what_is_derived_from_a_plan_is_kept_with_it_unless_it_is_large() -> None:
    total = weighted_sum(JOINT_LOSS)
    shapes = [(images, 3, FUSE_BELOW_PIXELS) for images in (8, KEPT_IMAGES + 1)]
    small, large = (Plan.of(batch_of(total, [shape], [1]), total, CPU) for shape in shapes)
    assert small.kept(Derived) is small.kept(Derived)
    assert large.kept(Derived) is not large.kept(Derived)


class Derived:
    def __init__(self, plan: Plan) -> None:
        assert plan.pixels > 0


def weights(classes: int, first: int) -> list[float]:
    return [first + 1 + c / 7 for c in range(classes)]


# Losses, each another one by its class weights; the shape of each request; and whether the requests are one joint.
LARGEST: dict[str, tuple[Callable[[int], LossLike], tuple[int, ...], bool]] = {
    "requests": (lambda i: LovaszSoftmax(class_weights=weights(4, i), per_image=True), (1, 4, 70), False),
    "classes": (
        lambda i: [(1.0, CrossEntropy(weights(1024, i))), (1.0, LovaszSoftmax(class_weights=weights(1024, i)))],
        (1, 1024, 1),
        True,
    ),
    "terms": (
        lambda i: [
            (1.0, kind(class_weights=weights(128, i + t))) for t in range(8) for kind in (CrossEntropy, LovaszSoftmax)
        ],
        (1, 128, 1),
        True,
    ),
}


@pytest.mark.parametrize("largest", LARGEST)
def test_kept_plans_take_few_bytes_whatever_callers_send(largest: str) -> None:
    pytest.importorskip("numba")
    loss_of, shape, is_joint = LARGEST[largest]
    shapes, plans = [shape] * KEPT_IMAGES, []

    def send(number: int) -> None:
        total = weighted_sum(loss_of(number))
        requests = list(batch_of(total, shapes).requests)
        joined = [len(shapes)] if is_joint else None
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
            requests[0] = replace(requests[0], labels=requests[0].labels.to(dtype))
            assert all(isinstance(a, Result) for a in submit(requests, total, CPU, joined=joined).collect())
        plans.append(Plan.of(Batch.of(requests, joined), total, CPU))

    send(0)  # The scratch is as large as it gets.
    gc.collect()
    tracemalloc.start()
    try:
        for number in (1, 2, 3):
            send(100 * number)
        gc.collect()
        nbytes = tracemalloc.get_traced_memory()[0] / 3
    finally:
        tracemalloc.stop()
    assert all(plan.is_kept for plan in plans)
    assert KEPT_PLANS * nbytes < 18 << 20


def test_threads_that_make_the_terms_of_a_kept_plan_at_the_same_time_do_no_harm() -> None:
    """Cached properties have no lock: one thread's terms may stand beside what another one derived from its own."""
    loss = weighted_sum([(1.0, CrossEntropy(ignore_index=2)), (1.0, LovaszSoftmax()), (0.5, CrossEntropy())])
    batch = batch_of(loss)
    plan = Plan.of(batch, loss, CPU)
    assert len(plan.cross_entropies) == 2
    del plan.__dict__["terms"]
    (first, *_) = submit(batch.requests, loss, CPU, joined=SIZES).collect()
    assert isinstance(first, Result)
