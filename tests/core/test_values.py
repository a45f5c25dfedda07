"""The core gives the vectors and the values that are known from elsewhere, through each of its entrances."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support import void_class
from support.comparison import norm_error
from support.vector_cases import Case, load
from support.ways import Way
from torch import Tensor

from lovasz.core import (
    CrossEntropy,
    LocalLoss,
    LovaszHinge,
    LovaszHingeLoss,
    LovaszSoftmax,
    LovaszSoftmaxLoss,
    compute,
    lovasz_hinge,
    lovasz_softmax,
)
from lovasz.spec import Classes, LossLike

GRADIENT, GRADIENT_FROM_TABLES = 1e-6, 3e-4
"""Errors, relative to the norm. Tables are for large groups: in these of a few hundred pixels, one bin in which two
pixels meet by chance costs up to 2e-4."""

vectors = pytest.mark.parametrize("case", load(), ids=lambda case: case.name)


def test_all_vectors_are_there() -> None:
    assert len(load()) == 16


@vectors
def test_compute_gives_the_vectors(case: Case, way: Way, device: torch.device) -> None:
    logits, labels = torch.from_numpy(case.logits).to(device), torch.from_numpy(case.labels).to(device)
    result = compute(logits, labels, case.loss_spec)
    assert result.loss == pytest.approx(case.loss, rel=1e-6)
    assert result.grad is not None
    assert result.grad.dtype == torch.float32
    assert result.grad.device == logits.device
    tolerance = GRADIENT_FROM_TABLES if way.counts(case.labels.size) else GRADIENT
    assert norm_error(result.grad, torch.from_numpy(case.grad)) < tolerance


@vectors
def test_compute_gives_the_vectors_in_float64(case: Case, torch_device: torch.device) -> None:
    logits = torch.from_numpy(case.logits).to(torch_device).double()
    labels = torch.from_numpy(case.labels).to(torch_device)
    result = compute(logits, labels, case.loss_spec)
    assert result.loss == pytest.approx(case.loss, rel=1e-13)
    assert norm_error(result.grad, torch.from_numpy(case.grad)) < 1e-13


@vectors
def test_function_and_modules_give_the_vectors(case: Case, way: Way, device: torch.device) -> None:
    options = {f.name: getattr(case.loss_spec, f.name) for f in dataclasses.fields(case.loss_spec)}
    is_softmax = isinstance(case.loss_spec, LovaszSoftmax)
    function = lovasz_softmax if is_softmax else lovasz_hinge
    module = LovaszSoftmaxLoss(**options) if is_softmax else LovaszHingeLoss(**options)
    for criterion in (lambda x, y: function(x, y, **options), module, LocalLoss([(1.0, case.loss_spec)])):
        logits = torch.from_numpy(case.logits).to(device).requires_grad_()
        loss = criterion(logits, torch.from_numpy(case.labels).to(device))
        loss.backward()
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(case.loss, rel=1e-6)
        tolerance = GRADIENT_FROM_TABLES if way.counts(case.labels.size) else GRADIENT
        assert norm_error(logits.grad, torch.from_numpy(case.grad)) < tolerance


@pytest.mark.parametrize(
    ("classes", "expected"), [("present", 7 / 15), ("all", 7 / 15), ((0,), 0.45), ((1, 2), 0.475), ((2, 1), 0.475)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_probabilities_of_a_point_cloud(
    classes: Classes, expected: float, dtype: torch.dtype, tolerance: float, device: torch.device
) -> None:
    probabilities = torch.tensor(
        [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5], [0.4, 0.5, 0.1]], dtype=dtype, device=device
    )
    labels = torch.tensor([0, 1, 2, 0], device=device)
    result = compute(probabilities, labels, LovaszSoftmax(classes=classes, input="probabilities"))
    assert result.loss == pytest.approx(expected, rel=tolerance)
    scored = list(range(3)) if isinstance(classes, str) else list(classes)
    expected_per_class = np.full(3, np.nan)
    expected_per_class[scored] = np.array([0.45, 0.45, 0.5])[scored]
    np.testing.assert_allclose(result.per_class_loss, expected_per_class, rtol=tolerance)


@pytest.mark.parametrize(("per_image", "expected"), [(True, 1.625), (False, 7 / 6)])
def test_hinge_by_hand(per_image: bool, expected: float, device: torch.device) -> None:
    logits = torch.tensor([[2, -1], [0.5, 1.5]], device=device)
    labels = torch.tensor([[0, 0], [1, 1]], device=device)
    assert lovasz_hinge(logits, labels, per_image=per_image).item() == pytest.approx(expected, rel=1e-6)


def test_hinge_example_gradient_by_hand(device: torch.device) -> None:
    logits = torch.tensor([[2, -1], [0.5, 1.5]], device=device)
    labels = torch.tensor([[0, 0], [1, 1]], device=device)
    grad = compute(logits, labels, LovaszHinge()).grad
    torch.testing.assert_close(grad, torch.tensor([[1 / 3, 0], [-1 / 3, 0]], device=device))


def random_batch_with_a_void_pixel() -> tuple[Tensor, Tensor]:
    np.random.seed(14)
    logits = torch.from_numpy(np.random.randn(2, 4, 8, 8).astype(np.float32))
    labels = torch.from_numpy(np.random.randint(0, 4, (2, 8, 8)))
    labels[0, 0, 0] = 255
    return logits, labels


def test_random_batch_with_a_void_pixel(device: torch.device) -> None:
    logits, labels = (tensor.to(device) for tensor in random_batch_with_a_void_pixel())
    logits.requires_grad_()
    loss = lovasz_softmax(logits, labels, ignore_index=255)
    loss.backward()
    assert loss.item() == pytest.approx(0.77665639, abs=2e-7)  # as computed elsewhere, in float32
    assert logits.grad is not None
    assert logits.grad.norm().item() == pytest.approx(0.01698170, abs=2e-8)
    assert (logits.grad[0, :, 0, 0] == 0).all()
    assert lovasz_softmax(logits, labels, per_image=True, ignore_index=255).item() == pytest.approx(0.7820425, abs=2e-7)


IGNORED = void_class.IGNORED


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (LovaszSoftmax(ignore_index=IGNORED), void_class.CLASS_IOU),
        (CrossEntropy(ignore_index=IGNORED), void_class.CLASS_IOU),
        ([(1, LovaszSoftmax(ignore_index=IGNORED)), (1, CrossEntropy(ignore_index=IGNORED))], void_class.CLASS_IOU),
        ([(1, LovaszSoftmax(ignore_index=IGNORED)), (1, CrossEntropy())], (1 / 3, 1 / 3, 1.0)),
    ],
    ids=["softmax", "cross-entropy", "both", "one counts it"],
)
def test_a_class_that_is_void_has_no_iou(
    loss: LossLike, expected: tuple[float, ...], way: Way, device: torch.device
) -> None:
    logits, labels = torch.from_numpy(void_class.logits()).to(device), torch.from_numpy(void_class.LABELS).to(device)
    result = compute(logits, labels, loss)
    np.testing.assert_array_equal(result.class_iou, expected)
    assert result.mean_iou == pytest.approx(np.nanmean(expected))


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize(("ignored", "expected"), [(None, 1 / 3), (0, 1 / 2), (1, np.nan)])
def test_a_foreground_that_is_void_has_no_iou(
    multilabel: bool, ignored: int | None, expected: float, way: Way, device: torch.device
) -> None:
    logits = torch.tensor([[[1.0, -1.0, 2.0, -2.0]]], device=device)
    labels = torch.tensor([[[1, 1, 0, 0]]], device=device)
    loss = LovaszHinge(ignore_index=ignored, multilabel=multilabel)
    np.testing.assert_array_equal(compute(logits, labels, loss).class_iou, [expected])
