"""The binary losses on a GPU: small errors of the sigmoid in tables, and sums that neither batch nor size changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.comparison import bits, norm_error, normal, random_labels, reference_answer
from support.ways import WAYS, Way
from torch import Tensor

from lovasz.core import BinaryCrossEntropy, LovaszHinge, LovaszSigmoid, compute
from lovasz.core.batch import Request
from lovasz.core.dispatch import Backend, submit
from lovasz.spec import LossLike, weighted_sum

pytest.importorskip("triton")

VOID = 255


def ways_of_triton(*ranks: str | None) -> pytest.MarkDecorator:
    ways = [way for way in WAYS if way.backend is Backend.TRITON and way.ranks in ranks]
    marks = {"cpu": [], "cuda": [pytest.mark.gpu]}
    return pytest.mark.parametrize(
        "way", [pytest.param(way, id=str(way), marks=marks[way.device]) for way in ways], indirect=True
    )


each_way = ways_of_triton(None, "in buckets", "in tables")
own_way = ways_of_triton(None)
LOSSES: dict[str, LossLike] = {
    "sigmoid": [
        (0.7, BinaryCrossEntropy([0.5, 0.0, 3.0], ignore_index=VOID, multilabel=True)),
        (-1.3, LovaszSigmoid(per_image=True, ignore_index=VOID, multilabel=True)),
        (0.1, LovaszSigmoid(ignore_index=VOID, multilabel=True)),
    ],
    "hinge": [
        (1.0, LovaszHinge(ignore_index=VOID, multilabel=True)),
        (0.5, BinaryCrossEntropy(ignore_index=VOID, multilabel=True)),
        (0.5, BinaryCrossEntropy(pos_weight=7.0, ignore_index=VOID, multilabel=True)),
    ],
    "cross-entropy alone": BinaryCrossEntropy(pos_weight=2.0, ignore_index=VOID, multilabel=True),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


@each_way
@pytest.mark.parametrize(("low", "high"), [(-20.0, 80.0), (20.0, 85.0), (-90.0, -1.0)], ids=["all", "right", "wrong"])
def test_errors_of_the_sigmoid_over_many_decades(low: float, high: float, way: Way, device: torch.device) -> None:
    """Down to e^-85, in a group that is counted in tables; where all are right, none reaches 2^-28."""
    labels = random_labels(1, 20_000, values=2, seed=1)
    margins = low + (high - low) * torch.rand(1, 20_000, generator=torch.Generator().manual_seed(2))
    logits = torch.where(labels == 1, margins, -margins)
    result = compute(logits.to(device), labels.to(device), LovaszSigmoid())
    expected, expected_grad = reference_answer(logits, labels, LovaszSigmoid())
    assert result.loss == pytest.approx(expected, rel=1e-6, abs=0)
    assert norm_error(result.grad, expected_grad) < 2e-5


@own_way
def test_binary_cross_entropy_of_logits_and_weights_of_any_size(way: Way, device: torch.device) -> None:
    labels = random_labels(3, 7, 90, values=2, seed=3)
    logits = normal(3, 7, 90, seed=4, dtype=torch.float32)
    for scale, pos_weight in ((1e38, 1e30), (1e38, 0.0), (1e-30, 1e-30), (30.0, 1e9)):
        loss = BinaryCrossEntropy(pos_weight)
        result = compute((scale * logits).to(device), labels.to(device), loss)
        expected, expected_grad = reference_answer(scale * logits, labels, loss)
        assert result.loss == pytest.approx(expected, rel=1e-6, abs=0)
        assert norm_error(result.grad, expected_grad) < 1e-6


@each_way
@each_loss
def test_joint_among_others_has_the_bits_of_one_request(name: str, way: Way, device: torch.device) -> None:
    loss = LOSSES[name]
    total = weighted_sum(loss)
    logits = 3 * normal(4, 3, 70, seed=5, dtype=torch.float32)
    labels = random_labels(4, 3, 70, values=2, seed=6, void=VOID)
    broken = torch.where(labels == VOID, 0.0, float("nan"))
    parts = [(logits[:1], labels[:1]), (logits[1:], labels[1:]), (1e9 * logits, labels), (broken, labels)]
    requests = [Request.checked(part.to(device), own.to(device), total) for part, own in parts]
    together = submit([requests[2], *requests[:2], requests[3]], total, device, joined=[1, 2, 1]).collect()
    whole = compute(logits.to(device), labels.to(device), loss)
    one, two = together[1:3]
    assert torch.equal(torch.cat([one.grad, two.grad]), whole.grad)
    values = bits(replace(whole, grad=None))
    assert [bits(replace(answer, grad=None)) for answer in (one, two)] == [values, values]
    loss_only = submit([requests[2]], total, device, want_grad=False).collect()[0]
    assert loss_only.loss == together[0].loss


@own_way
@each_loss
def test_void_pixels_have_gradient_zero_whatever_their_logits(name: str, way: Way, device: torch.device) -> None:
    logits = normal(2, 3, 60, seed=7, dtype=torch.float32)
    labels = random_labels(2, 3, 60, values=2, seed=8, void=VOID)
    expected = compute(logits.to(device), labels.to(device), LOSSES[name])
    for bad in (float("nan"), float("inf"), -float("inf")):
        result = compute(torch.where(labels == VOID, bad, logits).to(device), labels.to(device), LOSSES[name])
        assert bits(result) == bits(expected)


@own_way
@each_loss
def test_loss_that_stays_on_the_device_is_the_loss(name: str, way: Way, device: torch.device) -> None:
    total = weighted_sum(LOSSES[name])
    labels = random_labels(2, 3, 60, values=2, seed=9, void=VOID)
    request = Request.checked(normal(2, 3, 60, seed=10, dtype=torch.float32).to(device), labels.to(device), total)
    value, grad = submit([request], total, device, want_total=True).differentiable()
    result = compute(request.logits, request.labels, LOSSES[name])
    assert isinstance(value, Tensor)
    assert value.item() == pytest.approx(result.loss, rel=1e-7)
    assert grad is not None
    assert torch.equal(grad, result.grad)
