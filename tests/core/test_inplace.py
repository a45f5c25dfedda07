"""In-place arithmetic on a loss, as trainers do it: ``loss *= weight``, ``loss /= steps``, ``loss += auxiliary``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.comparison import normal, random_labels
from support.ways import Way
from torch import Tensor

from lovasz.client.torch import RemoteLoss
from lovasz.core import LocalLoss, LovaszHinge, LovaszSoftmax, LovaszSoftmaxLoss, lovasz_hinge, lovasz_softmax

Criterion = Callable[[Tensor, Tensor], Tensor]


def hinge_of_one_channel(logits: Tensor, labels: Tensor) -> Tensor:
    return lovasz_hinge(logits[:, 0], labels % 2)


CRITERIA: dict[str, Criterion] = {
    "lovasz_softmax": lovasz_softmax,
    "lovasz_hinge": hinge_of_one_channel,
    "LovaszSoftmaxLoss": LovaszSoftmaxLoss(per_image=True),
    "LocalLoss": LocalLoss([(0.5, LovaszSoftmax()), (2.0, LovaszSoftmax(classes="all"))]),
    "LocalLoss of a hinge": lambda x, y: LocalLoss(LovaszHinge(multilabel=True))(x, torch.stack([y % 2] * 3, 1)),
    "RemoteLoss in process": RemoteLoss("inprocess", LovaszSoftmax()),
}
each_criterion = pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA.keys())


def some_input(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits = normal(2, 3, 4, 4, seed=7, dtype=dtype).to(device).requires_grad_()
    return logits, random_labels(2, 4, 4, values=3, seed=8).to(device)


def changed(loss: Tensor, auxiliary: Tensor) -> Tensor:
    loss *= 0.5
    loss /= 4
    loss += auxiliary
    return loss


@each_criterion
def test_value_and_gradient_are_those_of_the_same_arithmetic_out_of_place(
    criterion: Criterion, way: Way, device: torch.device
) -> None:
    logits, labels = some_input(device)
    plain = criterion(logits, labels)
    (grad,) = torch.autograd.grad(plain, logits)
    value = plain.item()
    assert grad.norm() > 0
    loss = changed(criterion(logits, labels), 3 * logits.sum())
    loss.backward()
    assert loss.item() == pytest.approx(value / 8 + 3 * logits.sum().item(), rel=1e-6)
    torch.testing.assert_close(logits.grad, grad / 8 + 3)


@each_criterion
def test_with_retain_graph_the_gradient_comes_again(criterion: Criterion, device: torch.device) -> None:
    logits, labels = some_input(device)
    loss = criterion(logits, labels)
    loss *= 3
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    (plain,) = torch.autograd.grad(criterion(logits, labels), logits)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, 3 * plain)


@each_criterion
def test_losses_of_one_step_are_added_in_place(criterion: Criterion, device: torch.device) -> None:
    logits, labels = some_input(device)
    total = torch.zeros((), device=device)
    for _ in range(3):
        total += criterion(logits, labels)
    (grad,) = torch.autograd.grad(total, logits)
    (plain,) = torch.autograd.grad(criterion(logits, labels), logits)
    torch.testing.assert_close(grad, 3 * plain)


@each_criterion
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_gradient(criterion: Criterion, mode: Callable[[], torch.no_grad], device: torch.device) -> None:
    logits, labels = some_input(device)
    expected = criterion(logits, labels).item()
    with mode():
        loss = changed(criterion(logits, labels), torch.ones((), device=device))
        again = criterion(logits, labels)
    assert loss.item() == pytest.approx(expected / 8 + 1, rel=1e-6)
    assert again.item() == expected
    assert not loss.requires_grad
    # Validation sums the losses of batches in grad mode, too.
    constant = changed(criterion(logits.detach(), labels), torch.ones((), device=device))
    assert constant.item() == loss.item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_element_types(dtype: torch.dtype, device: torch.device) -> None:
    logits, labels = some_input(device, dtype)
    (grad,) = torch.autograd.grad(lovasz_softmax(logits, labels), logits)
    loss = lovasz_softmax(logits, labels)
    loss *= 4
    loss.backward()
    assert torch.equal(logits.grad, 4 * grad)  # type: ignore[arg-type]
