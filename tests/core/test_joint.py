"""Joined requests are scored as one: to the bit as one request of all their images, in that order."""

from __future__ import annotations

import pytest
import torch
from support.ways import Way

from lovasz.core.answers import Answer, JointFault
from lovasz.core.batch import Request
from lovasz.core.dispatch import submit
from lovasz.spec import (
    BinaryCrossEntropy,
    CrossEntropy,
    InvalidInput,
    LossLike,
    LovaszHinge,
    LovaszSigmoid,
    LovaszSoftmax,
    Result,
    weighted_sum,
)

LOSSES: dict[str, tuple[LossLike, int]] = {
    "softmax": (LovaszSoftmax(ignore_index=255), 5),
    "per image": (LovaszSoftmax(per_image=True, classes="all", ignore_index=255), 5),
    "weighted": (LovaszSoftmax(class_weights=(1, 2, 0, 3, 0.5), classes=(0, 3, 4)), 5),
    "terms": (
        [(0.5, CrossEntropy(label_smoothing=0.1, ignore_index=255)), (1.0, LovaszSoftmax(ignore_index=255))],
        5,
    ),
    "weighted cross-entropy": (CrossEntropy(class_weights=(1, 2, 0, 3, 0.5)), 5),
    "hinge": (LovaszHinge(), 1),
    "multilabel": (LovaszHinge(multilabel=True, per_image=True, ignore_index=7), 3),
    "binary": ([(1.0, BinaryCrossEntropy(pos_weight=3.0)), (1.0, LovaszSigmoid(per_image=True))], 1),
}


def a_request(loss: LossLike, images: int, channels: int, spatial: tuple[int, ...], seed: int = 0) -> Request:
    random = torch.Generator().manual_seed(seed)
    total = weighted_sum(loss)
    logits = torch.randn(images, channels, *spatial, generator=random) * 2
    shape = logits.shape if total.multilabel else (images, *spatial)
    # Classes are spread unevenly: a request holds some only.
    labels = torch.randint(seed % 2, 2 if total.is_binary else 2 + seed % 3, shape, generator=random)
    ignored = {term.ignore_index for _, term in total.terms} - {None, -100}
    if ignored:
        labels[torch.rand(shape, generator=random) < 0.2] = ignored.pop()
    return Request.checked(logits, labels, total)


def concatenated(requests: list[Request], loss: LossLike) -> Request:
    logits, labels = torch.cat([r.logits for r in requests]), torch.cat([r.labels for r in requests])
    return Request.checked(logits, labels, weighted_sum(loss))


def assert_one_answer(answers: list[Answer], whole: Answer, requests: list[Request]) -> None:
    assert isinstance(whole, Result)
    assert whole.grad is not None
    parts = whole.grad.split([len(r.logits) for r in requests])
    for answer, part in zip(answers, parts, strict=True):
        assert isinstance(answer, Result)
        assert answer.loss == whole.loss
        assert [t.loss for t in answer.terms] == [t.loss for t in whole.terms]
        torch.testing.assert_close(
            torch.tensor(answer.per_class_loss), torch.tensor(whole.per_class_loss), rtol=0, atol=0, equal_nan=True
        )
        assert (answer.intersection == whole.intersection).all()
        assert (answer.union == whole.union).all()
        assert answer.grad is not None
        assert torch.equal(answer.grad.cpu(), part.cpu())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("spatial", [(9, 7), (3,), (), (70, 90)], ids=str)
def test_a_joint_is_one_request(name: str, way: Way, device: torch.device, spatial: tuple[int, ...]) -> None:
    if way.is_interpreted and spatial != (9, 7):
        pytest.skip("takes Triton's interpreter too long")
    loss, channels = LOSSES[name]
    total = weighted_sum(loss)
    sizes = (3, 1, 4)
    requests = [a_request(loss, 1 + seed % 3, channels, spatial, seed) for seed in range(sum(sizes))]
    answers = submit(requests, total, device, joined=sizes).collect()
    assert len(answers) == len(requests)
    for first, size in ((0, 3), (3, 1), (4, 4)):
        joint = requests[first : first + size]
        (whole,) = submit([concatenated(joint, loss)], total, device).collect()
        assert_one_answer(answers[first : first + size], whole, joint)


def test_images_of_other_sizes_are_members_like_any_other(device: torch.device) -> None:
    """As point clouds, the same pixels are one request."""
    loss = [(1.0, LovaszSoftmax(ignore_index=255)), (1.0, CrossEntropy(ignore_index=255))]
    total = weighted_sum(loss)
    requests = [a_request(loss, 1, 5, spatial, seed) for seed, spatial in enumerate([(30, 50), (8,), (17, 3, 2), ()])]
    points = [
        Request.checked(r.logits.flatten(2).movedim(1, 2).reshape(-1, 5), r.labels.reshape(-1), total)
        if r.logits.dim() > 2
        else r
        for r in requests
    ]
    answers = submit(requests, total, device, joined=[4]).collect()
    (whole,) = submit([concatenated(points, loss)], total, device).collect()
    assert isinstance(whole, Result)
    assert whole.grad is not None
    for answer, part in zip(answers, whole.grad.split([len(p.logits) for p in points]), strict=True):
        assert isinstance(answer, Result)
        assert answer.grad is not None
        assert answer.loss == whole.loss
        flat = answer.grad if answer.grad.dim() == 2 else answer.grad.flatten(2).movedim(1, 2).reshape(-1, 5)
        assert torch.equal(flat.cpu(), part.cpu())


def test_float64_is_joined_too(device: torch.device) -> None:
    loss = LovaszSoftmax()
    requests = [a_request(loss, 2, 5, (6, 6), seed) for seed in range(3)]
    doubles = [Request.checked(r.logits.double(), r.labels, weighted_sum(loss)) for r in requests]
    answers = submit(doubles, weighted_sum(loss), device, joined=[3]).collect()
    (whole,) = submit([concatenated(doubles, loss)], weighted_sum(loss), device).collect()
    assert_one_answer(answers, whole, doubles)


def test_a_fault_of_one_is_told_to_all_of_its_joint_and_to_no_other(device: torch.device) -> None:
    loss = LovaszSoftmax()
    requests = [a_request(loss, 1, 5, (6, 6), seed) for seed in range(4)]
    requests[1].labels[0, 2, 3] = 9
    answers = submit(requests, weighted_sum(loss), device, joined=[3, 1]).collect()
    assert isinstance(answers[1], InvalidInput)
    assert "got 9 at index [0, 2, 3]" in str(answers[1])
    for answer in (answers[0], answers[2]):
        assert isinstance(answer, JointFault)
        assert answer.place == 1
        assert answer.fault is answers[1]
    assert isinstance(answers[3], Result)


def test_a_logit_that_is_not_finite_makes_the_loss_of_all_not_a_number(device: torch.device) -> None:
    loss = LovaszSoftmax()
    requests = [a_request(loss, 1, 5, (6, 6), seed) for seed in range(3)]
    requests[2].logits[0, 0, 0, 0] = float("nan")
    answers = submit(requests, weighted_sum(loss), device, joined=[2, 1]).collect()
    assert isinstance(answers[0], Result)
    assert answers[0].loss == answers[0].loss
    answers = submit(requests, weighted_sum(loss), device, joined=[3]).collect()
    for answer in answers:
        assert isinstance(answer, Result)
        assert answer.grad is not None
        assert answer.loss != answer.loss
        assert answer.grad.isnan().all()


# --- Requests without images --------------------------------------------------------------------------------------


def an_empty_request(loss: LossLike, channels: int, spatial: tuple[int, ...]) -> Request:
    total = weighted_sum(loss)
    shape = (0, channels, *spatial)
    logits, labels = torch.zeros(shape), torch.zeros(shape if total.multilabel else (0, *spatial), dtype=torch.int64)
    return Request(logits, labels, total.layout(logits.shape, labels.shape, may_be_empty=True))


@pytest.mark.parametrize("name", LOSSES)
def test_a_request_without_images_changes_nothing_and_gets_the_answer_of_its_joint(
    name: str, way: Way, device: torch.device
) -> None:
    loss, channels = LOSSES[name]
    total = weighted_sum(loss)
    images = [a_request(loss, 1 + seed, channels, (9, 7), seed) for seed in range(3)]
    empty = an_empty_request(loss, channels, (9, 7))
    requests = [empty, images[0], empty, images[1], images[2], empty]
    answers = submit(requests, total, device, joined=(4, 2)).collect()
    for first, joint in ((0, images[:2]), (4, images[2:])):
        size = 4 if first == 0 else 2
        (whole,) = submit([concatenated(joint, loss)], total, device).collect()
        assert_one_answer(answers[first : first + size], whole, requests[first : first + size])


@pytest.mark.parametrize("want_grad", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_no_images_is_0(name: str, want_grad: bool, device: torch.device) -> None:
    loss, channels = weighted_sum(LOSSES[name][0]), LOSSES[name][1]
    empty, other = an_empty_request(loss, channels, (9, 7)), a_request(loss, 2, channels, (9, 7))
    for requests, joined in (([empty], (1,)), ([empty, empty, other], (2, 1))):
        answers = submit(requests, loss, device, joined=joined, want_grad=want_grad).collect()
        for answer in answers[: joined[0]]:
            assert isinstance(answer, Result)
            assert (answer.loss, {term.loss for term in answer.terms}) == (0.0, {0.0})
            for term in answer.terms:
                assert term.per_class_loss.shape == (0 if "cross_entropy" in term.kind else channels,)
            assert answer.intersection.shape == answer.union.shape == (channels,)
            assert not answer.union.any()
            assert (None if answer.grad is None else answer.grad.shape) == ((0, channels, 9, 7) if want_grad else None)


def test_the_position_of_a_fault_counts_requests_without_images(device: torch.device) -> None:
    loss = weighted_sum(LovaszSoftmax())
    empty, bad = an_empty_request(loss, 5, (9, 7)), a_request(loss, 1, 5, (9, 7), 1)
    bad.labels[0, 0, 0] = 9
    answers = submit([empty, a_request(loss, 1, 5, (9, 7)), empty, bad], loss, device, joined=(4,)).collect()
    assert isinstance(answers[3], InvalidInput)
    for answer in answers[:3]:
        assert isinstance(answer, JointFault)
        assert answer.place == 3
        assert answer.fault.problem == answers[3].problem


def test_callers_may_write_to_what_they_get(device: torch.device) -> None:
    loss, channels = LOSSES["softmax"]
    total = weighted_sum(loss)
    requests = [a_request(loss, 1, channels, (9, 7), seed) for seed in range(3)]

    def asked() -> list[Answer]:
        return submit(requests, total, device, joined=[2, 1]).collect()

    answers = asked()
    for answer in answers:
        assert isinstance(answer, Result)
        assert answer.grad is not None
        for own in (answer.grad, answer.intersection, answer.union):
            own += 1
    for changed, answer in zip(answers, asked(), strict=True):
        assert isinstance(changed, Result)
        assert isinstance(answer, Result)
        assert torch.equal(changed.grad, answer.grad + 1)
        assert (changed.intersection == answer.intersection + 1).all()
        assert (changed.union == answer.union + 1).all()
