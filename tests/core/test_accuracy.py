"""Hard numbers: saturated logits, ties of everything, rare classes, many decades, many pixels."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from support.comparison import (
    IN_TABLES,
    norm_error,
    normal,
    random_labels,
    reference_answer,
    shared_ties_answer,
)
from support.ways import NUMBA, NUMBA_TABLES, Way
from torch import Tensor

from lovasz.core import CrossEntropy, LovaszHinge, LovaszSoftmax, compute
from lovasz.core.dispatch import Backend
from lovasz.spec import LossLike

TOLERANCES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-11)], ids=["float32", "float64"]
)
MIX: LossLike = [(1.0, CrossEntropy()), (1.0, LovaszSoftmax())]


def expected_answer(logits: Tensor, labels: Tensor, loss: LossLike, way: Way) -> tuple[float, Tensor]:
    """The reference's, with the gradient that its ties have on this way."""
    shared = way.counts(labels.numel()) and logits.dtype != torch.float64
    return (shared_ties_answer if shared else reference_answer)(logits, labels, loss)


@TOLERANCES
@pytest.mark.parametrize("loss", [LovaszSoftmax(classes="all"), CrossEntropy(), MIX], ids=["lovasz", "ce", "mix"])
def test_saturated_logits(loss: LossLike, dtype: torch.dtype, tolerance: float, way: Way, device: torch.device) -> None:
    labels = random_labels(2, 300, values=4, seed=1)
    logits = 100.0 * torch.randint(-1, 2, (2, 4, 300), generator=torch.Generator().manual_seed(2)).to(dtype)
    result = compute(logits.to(device), labels.to(device), loss)
    expected, expected_grad = expected_answer(logits, labels, loss, way)
    assert result.loss == pytest.approx(expected, rel=tolerance)
    assert norm_error(result.grad, expected_grad) < tolerance


@TOLERANCES
@pytest.mark.parametrize("per_image", [False, True])
def test_all_errors_are_0_or_1(
    per_image: bool, dtype: torch.dtype, tolerance: float, way: Way, device: torch.device
) -> None:
    """Here the loss of a class is its Jaccard loss, and what the errors can tell apart is right from wrong."""
    labels = random_labels(2, 500, values=3, seed=21)
    prediction = torch.where(torch.rand(2, 500, generator=torch.Generator().manual_seed(22)) < 0.7, labels, 2)
    probabilities = torch.nn.functional.one_hot(prediction, 3).movedim(-1, 1).to(dtype)
    loss = LovaszSoftmax(per_image=per_image, input="probabilities")
    result = compute(probabilities.to(device), labels.to(device), loss)
    expected, expected_grad = expected_answer(probabilities, labels, loss, way)
    assert result.loss == pytest.approx(expected, rel=tolerance)
    assert norm_error(result.grad, expected_grad) < tolerance
    saturated = compute(200 * probabilities.to(device) - 100, labels.to(device), LovaszSoftmax(per_image=per_image))
    assert saturated.loss == pytest.approx(expected, rel=tolerance)
    assert saturated.intersection.tolist() == result.intersection.tolist()
    if not per_image:
        assert 1 - result.class_iou.mean() == pytest.approx(expected, rel=1e-12)


@TOLERANCES
def test_saturated_and_right(dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    """The label stands 80 above the rest: cross-entropy is e^-80 a class, which 1 - p and log p cannot show."""
    labels = random_labels(1, 50, values=3, seed=3).to(device)
    logits = torch.full((1, 3, 50), -40.0, dtype=dtype, device=device).scatter_(1, labels.unsqueeze(1), 40.0)
    result = compute(logits, labels, CrossEntropy())
    probability = torch.tensor(-80.0, dtype=torch.float64).exp().item()
    assert result.loss == pytest.approx(2 * probability, rel=tolerance * 10, abs=0)
    assert result.grad is not None
    of_labels = result.grad.gather(1, labels.unsqueeze(1)).cpu().double() * 50
    torch.testing.assert_close(of_labels, torch.full_like(of_labels, -2 * probability), rtol=tolerance * 10, atol=0)


def test_gradient_of_trained_logits_on_the_class_of_the_label(way: Way, device: torch.device) -> None:
    """Here 1 - p is 1e-5, of which a subtraction in float32 leaves two digits."""
    labels = random_labels(1, 4000, values=4, seed=14)
    logits = normal(1, 4, 4000, seed=15).scatter_add(1, labels.unsqueeze(1), torch.full((1, 1, 4000), 12.0).double())
    logits = logits.float()
    result = compute(logits.to(device), labels.to(device), LovaszSoftmax())
    expected, expected_grad = reference_answer(logits, labels, LovaszSoftmax())
    assert result.loss == pytest.approx(expected, rel=1e-6, abs=0)
    assert result.grad is not None
    of_labels = result.grad.cpu().gather(1, labels.unsqueeze(1))
    tolerance = 2e-4 if way.counts(4000) else 2e-6
    assert norm_error(of_labels, expected_grad.gather(1, labels.unsqueeze(1))) < tolerance


@TOLERANCES
@pytest.mark.parametrize("classes", [2, 3, 8])
def test_all_errors_equal(classes: int, dtype: torch.dtype, tolerance: float, way: Way, device: torch.device) -> None:
    labels = random_labels(1, 4000, values=classes, seed=4)
    logits = torch.zeros(1, classes, 4000, dtype=dtype)
    result = compute(logits.to(device), labels.to(device), LovaszSoftmax())
    expected, expected_grad = expected_answer(logits, labels, LovaszSoftmax(), way)
    assert result.loss == pytest.approx(expected, rel=tolerance)
    assert norm_error(result.grad, expected_grad) < tolerance


@TOLERANCES
def test_all_hinge_errors_equal(dtype: torch.dtype, tolerance: float, way: Way, device: torch.device) -> None:
    labels = random_labels(1, 4000, values=2, seed=23)
    logits = torch.zeros(1, 4000, dtype=dtype)
    result = compute(logits.to(device), labels.to(device), LovaszHinge())
    expected, expected_grad = expected_answer(logits, labels, LovaszHinge(), way)
    assert result.loss == pytest.approx(expected, rel=tolerance)
    assert norm_error(result.grad, expected_grad) < tolerance


@cache
def one_foreground_pixel(pixels: int, error: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, float, Tensor]:
    logits = normal(1, pixels, seed=5, dtype=dtype)
    labels = torch.zeros(1, pixels, dtype=torch.uint8)
    labels[0, 12345] = 1
    logits[0, 12345] = 1 - 8 * error
    return logits, labels, *reference_answer(logits, labels, LovaszHinge())


@TOLERANCES
@pytest.mark.parametrize("error", [0.1, 0.9])
def test_one_foreground_pixel_among_2_to_the_20(
    error: float, dtype: torch.dtype, tolerance: float, way: Way, device: torch.device
) -> None:
    way.require_speed(2**20)
    way.require_ranks_of_rare_classes()
    logits, labels, expected, expected_grad = one_foreground_pixel(2**20, error, dtype)
    result = compute(logits.to(device), labels.to(device), LovaszHinge())
    assert result.loss == pytest.approx(expected, rel=tolerance)
    counted = way.counts(2**20) and dtype != torch.float64
    assert norm_error(result.grad, expected_grad) < (1e-5 if counted else tolerance)
    assert result.union.tolist() == [int(((logits > 0) | (labels == 1)).sum())]


@cache
def one_pixel_of_another_class(pixels: int, margin: float) -> tuple[Tensor, Tensor, float, Tensor]:
    logits = torch.randn(1, 2, pixels, generator=torch.Generator().manual_seed(24))
    labels = torch.zeros(1, pixels, dtype=torch.uint8)
    labels[0, 333_333] = 1
    logits[0, 0] += margin
    return logits, labels, *reference_answer(logits, labels, LovaszSoftmax())


@pytest.mark.parametrize(("pixels", "margin"), [(2**22, 0.0), (2**20, 6.0)], ids=["fresh", "trained"])
def test_one_pixel_of_a_class(pixels: int, margin: float, way: Way, device: torch.device) -> None:
    """Its rank alone decides: every swap in float32 of two errors counts, and every bin that two of them share."""
    way.require_speed(2 * pixels)
    way.require_ranks_of_rare_classes()
    logits, labels, expected, expected_grad = one_pixel_of_another_class(pixels, margin)
    result = compute(logits.to(device), labels.to(device), LovaszSoftmax())
    assert result.loss == pytest.approx(expected, rel=1e-6)
    exact = (way.backend is Backend.TRITON or way == NUMBA) or not way.counts(pixels)
    assert norm_error(result.grad, expected_grad) < (2e-5 if exact else 5e-4)


@TOLERANCES
def test_probabilities_of_softmax_over_many_decades(
    dtype: torch.dtype, tolerance: float, way: Way, device: torch.device
) -> None:
    logits = -70 * torch.rand(1, 4, 8000, dtype=torch.float64, generator=torch.Generator().manual_seed(6)).to(dtype)
    labels = random_labels(1, 8000, values=4, seed=7)
    for loss in (MIX, LovaszSoftmax()):
        result = compute(logits.to(device), labels.to(device), loss)
        expected, expected_grad = reference_answer(logits, labels, loss)
        assert result.loss == pytest.approx(expected, rel=tolerance)
        assert norm_error(result.grad, expected_grad) < (3e-5 if way.counts(8000) else tolerance * 3)


@TOLERANCES
def test_hinge_errors_over_many_decades(dtype: torch.dtype, tolerance: float, way: Way, device: torch.device) -> None:
    decades = 30 * torch.rand(1, 20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    labels = random_labels(1, 20_000, values=2, seed=9)
    logits = torch.where(labels == 1, -(10**decades), 10**decades).to(dtype)
    result = compute(logits.to(device), labels.to(device), LovaszHinge())
    expected, expected_grad = reference_answer(logits, labels, LovaszHinge())
    assert result.loss == pytest.approx(expected, rel=tolerance)
    if not way.counts(20_000):
        assert norm_error(result.grad, expected_grad) < tolerance
        return
    if way.backend is Backend.TRITON:  # It gives each scale of errors bins of its own.
        assert norm_error(result.grad, expected_grad) < (2e-5 if way.ranks is None else 1e-4)
        return
    # Tables: 32 bins an octave are left where errors are small, and what is smaller still has one bin together, where
    # the gradient is anything from 0 to its mean.
    assert result.grad is not None
    errors = 1 + logits.abs()
    small = errors < IN_TABLES * 2 ** math.floor(math.log2(errors.max()))
    assert 0.3 < small.float().mean() < 0.4
    assert norm_error(result.grad.cpu()[~small], expected_grad[~small]) < 1e-3
    share = result.grad.cpu().double() / shared_ties_answer(logits, labels, LovaszHinge())[1]
    assert (share[small] >= 0).all()
    assert (share[small] <= 1.001).all()


@pytest.mark.parametrize("crowd", [1000, 1500, 2000, 2500, 4000])
@pytest.mark.parametrize("hinge", [False, True])
def test_ranks_behind_a_crowd_of_ties(hinge: bool, crowd: int, way: Way, device: torch.device) -> None:
    """However many pixels tie, those behind them come behind all of them."""
    if way.ranks == "in tables":
        pytest.skip("a table keeps no order within bins")
    generator = torch.Generator().manual_seed(51)
    labels = (torch.rand(1, 9000, generator=generator) < 0.3).long()
    errors = 0.9 * torch.rand(1, 9000, generator=generator)
    tied = torch.randperm(9000, generator=generator)[:crowd]
    errors[0, tied[: crowd // 2]], errors[0, tied[crowd // 2 :]] = 0.75, 0.5
    if hinge:
        loss: LossLike = LovaszHinge()
        values = torch.where(labels == 1, 1 - errors, errors - 1)
    else:
        loss = LovaszSoftmax(classes=[1], input="probabilities")
        right = torch.where(labels == 1, 1 - errors, errors)
        values = torch.stack([1 - right, right], 1)
    result = compute(values.to(device), labels.to(device), loss)
    expected, expected_grad = reference_answer(values, labels, loss)
    assert result.loss == pytest.approx(expected, rel=1e-6)
    others = torch.ones(9000, dtype=torch.bool)
    others[tied] = False
    assert result.grad is not None
    tolerance = 2e-4 if way == NUMBA_TABLES else 2e-6
    assert norm_error(result.grad.cpu()[..., others], expected_grad[..., others]) < tolerance


@pytest.mark.parametrize("width", [1.4e-5, 2.9e-5, 5.5e-5, 1.15e-4])
@pytest.mark.parametrize("lower", ["background", "foreground"])
def test_no_gradient_has_the_wrong_sign_at_the_lower_end_of_a_bin(
    lower: str, width: float, way: Way, device: torch.device
) -> None:
    """Most errors of a bin are at its upper end, where g is near the mean; each width is that of bins in a table."""
    pixels, foreground, few = 12_000, 1000, 20
    labels = (torch.arange(pixels) < foreground).long().unsqueeze(0)
    errors = torch.full((1, pixels), 1 - 2.0**-24)
    errors[labels == 1] = 0.5
    if lower == "background":
        errors[0, -pixels // 10 :] = 1 - width
    else:
        errors[0, :few], errors[0, 0] = 1 - 2.0**-24, 1 - width
    right = torch.where(labels == 1, 1 - errors, errors)
    loss = LovaszSoftmax(classes=[1], input="probabilities")
    result = compute(torch.stack([1 - right, right], 1).to(device), labels.to(device), loss)
    assert result.grad is not None
    g = torch.where(labels == 1, -1.0, 1.0) * result.grad[:, 1].cpu()
    assert (g >= 0).all()
    assert g.double().sum() == pytest.approx(1, rel=1e-5)


def test_many_classes(way: Way, device: torch.device) -> None:
    classes = 300 if way.is_interpreted else 1000
    logits, labels = normal(1, classes, 30, seed=10, dtype=torch.float32), random_labels(1, 30, values=classes, seed=11)
    result = compute(logits.to(device), labels.to(device), LovaszSoftmax(classes="all"))
    expected, expected_grad = reference_answer(logits, labels, LovaszSoftmax(classes="all"))
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert norm_error(result.grad, expected_grad) < 1e-5


LARGE: LossLike = LovaszSoftmax(classes=[1])


@cache
def large(pixels: int, margin: float) -> tuple[Tensor, Tensor, float, Tensor]:
    logits = torch.randn(1, 2, pixels, generator=torch.Generator().manual_seed(12))
    labels = (torch.rand(1, pixels, generator=torch.Generator().manual_seed(13)) < 0.1).to(torch.uint8)
    logits.scatter_add_(1, labels.long().unsqueeze(1), torch.full((1, 1, pixels), margin))
    return logits, labels, *reference_answer(logits, labels, LARGE)


@pytest.mark.parametrize(("pixels", "margin"), [(2**20, 0.0), (2**22, 6.0)], ids=["fresh", "trained"])
def test_large(pixels: int, margin: float, way: Way, device: torch.device) -> None:
    way.require_speed(2 * pixels)
    logits, labels, expected, expected_grad = large(pixels, margin)
    result = compute(logits.to(device), labels.to(device), LARGE)
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert norm_error(result.grad, expected_grad) < (2e-5 if way.counts(pixels) else 5e-6)
