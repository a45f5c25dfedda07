"""``MMSegLoss`` around a local and a remote loss, called as mmsegmentation's decode heads do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.comparison import norm_error, normal, random_labels, reference_answer
from torch import Tensor

from lovasz.client.adapters import MMSegLoss
from lovasz.client.torch import RemoteLoss
from lovasz.core import CrossEntropy, LocalLoss, LovaszSoftmax
from lovasz.server.launch import ServerProcess
from lovasz.spec import LossLike

TERMS: LossLike = [(1.0, CrossEntropy(ignore_index=255)), (2.0, LovaszSoftmax(ignore_index=255))]


@pytest.fixture(params=["local", "remote"])
def criterion(request: pytest.FixtureRequest, server: ServerProcess) -> torch.nn.Module:
    return LocalLoss(TERMS) if request.param == "local" else RemoteLoss(server.target, TERMS)


def scene() -> tuple[Tensor, Tensor]:
    logits = normal(2, 5, 6, 7, seed=1, dtype=torch.float32).requires_grad_()
    return logits, random_labels(2, 6, 7, values=5, seed=2, void=255)


def test_a_decode_head_gets_the_weighted_loss_and_its_gradient(criterion: torch.nn.Module) -> None:
    logits, labels = scene()
    loss, grad = reference_answer(logits.detach(), labels, TERMS)
    adapted = MMSegLoss(criterion, loss_weight=0.4)
    total = adapted(logits, labels, weight=None, ignore_index=255)
    total.backward()
    assert total.item() == pytest.approx(0.4 * loss, rel=1e-6)
    assert norm_error(logits.grad, 0.4 * grad) < 5e-6


def test_losses_of_one_name_are_summed_in_place(criterion: torch.nn.Module) -> None:
    """As a decode head does where two of its losses have the same ``loss_name``."""
    logits, labels = scene()
    loss, grad = reference_answer(logits.detach(), labels, TERMS)
    total = MMSegLoss(criterion)(logits, labels)
    total += MMSegLoss(criterion, loss_weight=0.5)(logits, labels)
    total.backward()
    assert total.item() == pytest.approx(1.5 * loss, rel=1e-6)
    assert norm_error(logits.grad, 1.5 * grad) < 5e-6


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"weight": torch.ones(2, 6, 7)}, "weight: got pixel weights; expected None"),
        ({"avg_factor": 3.0}, "avg_factor: got 3.0; expected None"),
        ({"reduction_override": "sum"}, "reduction_override: got 'sum'; expected None or 'mean'"),
        ({"ignore_index": 0}, "ignore_index: got 0 from the decode head, and 255 in CrossEntropy"),
    ],
)
def test_what_the_loss_cannot_follow_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MMSegLoss(LocalLoss(TERMS))(*scene(), **arguments)


def test_each_term_needs_the_heads_ignore_index() -> None:
    """CrossEntropy's own default is torch's -100, a head's 255: void pixels would be an error for one term only."""
    terms: LossLike = [(1.0, LovaszSoftmax(ignore_index=255)), (1.0, CrossEntropy())]
    with pytest.raises(ValueError, match=r"ignore_index: got 255 .* -100 in CrossEntropy"):
        MMSegLoss(LocalLoss(terms))(*scene())


def test_a_name_that_mmsegmentation_would_not_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match="loss_name: got 'lovasz'; expected a name that contains 'loss'"):
        MMSegLoss(LocalLoss(TERMS), loss_name="lovasz")


def test_other_criteria_are_refused() -> None:
    with pytest.raises(TypeError, match="criterion: got CrossEntropyLoss; expected a LocalLoss or a RemoteLoss"):
        MMSegLoss(torch.nn.CrossEntropyLoss())


def test_it_shows_its_options() -> None:
    adapted = MMSegLoss(LocalLoss(TERMS), loss_weight=0.5)
    assert adapted.loss_name == "loss_lovasz"
    assert "loss_weight=0.5, loss_name='loss_lovasz'" in repr(adapted)
