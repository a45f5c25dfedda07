"""Hard numbers: saturated logits, ties of everything, rare classes, many decades, many pixels."""

from __future__ import annotations

import pytest
import torch
from core.comparison import norm_error, normal, random_labels, reference_answer

from lovasz.core import CrossEntropy, LovaszHinge, LovaszSoftmax, compute
from lovasz.spec import LossLike

TOLERANCES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-11)], ids=["float32", "float64"]
)
MIX: LossLike = [(1.0, CrossEntropy()), (1.0, LovaszSoftmax())]


@TOLERANCES
@pytest.mark.parametrize("loss", [LovaszSoftmax(classes="all"), CrossEntropy(), MIX], ids=["lovasz", "ce", "mix"])
def test_saturated_logits(loss: LossLike, dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    labels = random_labels(2, 300, values=4, seed=1)
    logits = 100.0 * torch.randint(-1, 2, (2, 4, 300), generator=torch.Generator().manual_seed(2)).to(dtype)
    result = compute(logits.to(device), labels.to(device), loss)
    expected, expected_grad = reference_answer(logits, labels, loss)
    assert result.loss == pytest.approx(expected, rel=tolerance)
    assert norm_error(result.grad, expected_grad) < tolerance


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


def test_gradient_of_trained_logits_on_the_class_of_the_label(device: torch.device) -> None:
    """Here 1 - p is 1e-5, of which a subtraction in float32 leaves two digits."""
    labels = random_labels(1, 4000, values=4, seed=14)
    logits = normal(1, 4, 4000, seed=15).scatter_add(1, labels.unsqueeze(1), torch.full((1, 1, 4000), 12.0).double())
    logits = logits.float()
    result = compute(logits.to(device), labels.to(device), LovaszSoftmax())
    expected, expected_grad = reference_answer(logits, labels, LovaszSoftmax())
    assert result.loss == pytest.approx(expected, rel=1e-6, abs=0)
    assert result.grad is not None
    of_labels = result.grad.cpu().gather(1, labels.unsqueeze(1))
    assert norm_error(of_labels, expected_grad.gather(1, labels.unsqueeze(1))) < 2e-6


@TOLERANCES
@pytest.mark.parametrize("classes", [2, 3, 8])
def test_all_errors_equal(classes: int, dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    labels = random_labels(1, 5000, values=classes, seed=4)
    logits = torch.zeros(1, classes, 5000, dtype=dtype)
    result = compute(logits.to(device), labels.to(device), LovaszSoftmax())
    expected, expected_grad = reference_answer(logits, labels, LovaszSoftmax())
    assert result.loss == pytest.approx(expected, rel=tolerance)
    assert norm_error(result.grad, expected_grad) < tolerance


@TOLERANCES
@pytest.mark.parametrize("error", [0.1, 0.9])
def test_one_foreground_pixel_among_2_to_the_20(
    error: float, dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    pixels = 2**20
    logits = normal(1, pixels, seed=5, dtype=dtype)
    labels = torch.zeros(1, pixels, dtype=torch.uint8)
    labels[0, 12345] = 1
    logits[0, 12345] = 1 - 8 * error
    result = compute(logits.to(device), labels.to(device), LovaszHinge())
    expected, expected_grad = reference_answer(logits, labels, LovaszHinge())
    assert result.loss == pytest.approx(expected, rel=tolerance)
    assert norm_error(result.grad, expected_grad) < tolerance
    assert result.union.tolist() == [int(((logits > 0) | (labels == 1)).sum())]


@TOLERANCES
def test_probabilities_of_softmax_over_many_decades(dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    logits = -70 * torch.rand(1, 4, 20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(6)).to(dtype)
    labels = random_labels(1, 20_000, values=4, seed=7)
    result = compute(logits.to(device), labels.to(device), MIX)
    expected, expected_grad = reference_answer(logits, labels, MIX)
    assert result.loss == pytest.approx(expected, rel=tolerance)
    assert norm_error(result.grad, expected_grad) < tolerance * 3


@TOLERANCES
def test_hinge_errors_over_many_decades(dtype: torch.dtype, tolerance: float, device: torch.device) -> None:
    decades = 30 * torch.rand(1, 20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    labels = random_labels(1, 20_000, values=2, seed=9)
    logits = torch.where(labels == 1, -(10**decades), 10**decades).to(dtype)
    result = compute(logits.to(device), labels.to(device), LovaszHinge())
    expected, expected_grad = reference_answer(logits, labels, LovaszHinge())
    assert result.loss == pytest.approx(expected, rel=tolerance)
    assert norm_error(result.grad, expected_grad) < tolerance


def test_many_classes(device: torch.device) -> None:
    logits, labels = normal(1, 1000, 30, seed=10, dtype=torch.float32), random_labels(1, 30, values=1000, seed=11)
    result = compute(logits.to(device), labels.to(device), LovaszSoftmax(classes="all"))
    expected, expected_grad = reference_answer(logits, labels, LovaszSoftmax(classes="all"))
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert norm_error(result.grad, expected_grad) < 1e-5


@pytest.mark.parametrize(("pixels", "margin"), [(2**20, 0.0), (2**22, 6.0)], ids=["fresh", "trained"])
def test_large(pixels: int, margin: float, device: torch.device) -> None:
    logits = torch.randn(1, 2, pixels, generator=torch.Generator().manual_seed(12))
    labels = (torch.rand(1, pixels, generator=torch.Generator().manual_seed(13)) < 0.1).to(torch.uint8)
    logits.scatter_add_(1, labels.long().unsqueeze(1), torch.full((1, 1, pixels), margin))
    loss = LovaszSoftmax(classes=[1])
    result = compute(logits.to(device), labels.to(device), loss)
    expected, expected_grad = reference_answer(logits, labels, loss)
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert norm_error(result.grad, expected_grad) < 5e-6
