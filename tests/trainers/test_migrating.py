"""What docs/migrating.md says of the losses of segmentation-models-pytorch and mmsegmentation, against their code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.comparison import norm_error, reference_answer
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lovasz.core import LocalLoss, LovaszHinge, LovaszSoftmax

pytestmark = pytest.mark.filterwarnings("default")

VOID = 255


@pytest.fixture
def smp() -> Any:
    return pytest.importorskip("segmentation_models_pytorch").losses.LovaszLoss


@pytest.fixture
def mmseg() -> Any:
    pytest.importorskip("mmseg")
    from mmseg.models.losses import LovaszLoss

    return LovaszLoss


@pytest.fixture(params=["smp", "mmseg"])
def multiclass(request: pytest.FixtureRequest) -> Callable[..., Callable[..., Tensor]]:
    """Makes a multi-class loss of either, with void pixels; takes ``per_image``."""
    loss = request.getfixturevalue(request.param)
    if request.param == "smp":
        return lambda per_image=False: loss("multiclass", ignore_index=VOID, per_image=per_image)

    def made(per_image: bool = False) -> Callable[..., Tensor]:
        inner = loss(per_image=per_image, reduction="mean" if per_image else "none")
        return lambda logits, labels: inner(logits, labels, ignore_index=VOID)

    return made


def scene() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(2, 4, 32, 32, generator=generator)).requires_grad_()
    labels = torch.randint(0, 4, (2, 32, 32), generator=generator)
    labels[:, 0] = VOID
    return logits, labels


def test_the_value_is_the_same_and_the_gradient_less_exact(multiclass: Callable[..., Any]) -> None:
    logits, labels = scene()
    expected, grad = reference_answer(logits.detach(), labels, LovaszSoftmax(ignore_index=VOID))
    loss = multiclass()(logits, labels)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert 5e-6 < norm_error(logits.grad, grad) < 1e-4


def test_all_void(multiclass: Callable[..., Any]) -> None:
    logits, labels = scene()
    loss = multiclass()(logits, torch.full_like(labels, VOID))
    assert loss.numel() == 0
    with pytest.raises(RuntimeError, match="scalar"):
        loss.backward()
    ours = LocalLoss(LovaszSoftmax(ignore_index=VOID))(logits, torch.full_like(labels, VOID))
    ours.backward()
    assert ours.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_one_void_image(multiclass: Callable[..., Any]) -> None:
    logits, labels = scene()
    labels[1] = VOID
    with pytest.raises(RuntimeError):
        multiclass(per_image=True)(logits, labels)
    ours = LocalLoss(LovaszSoftmax(ignore_index=VOID, per_image=True))(logits, labels)
    alone = LocalLoss(LovaszSoftmax(ignore_index=VOID))(logits[:1], labels[:1])
    assert ours.item() == pytest.approx(alone.item() / 2, rel=1e-6)


def test_one_valid_pixel_fails_in_mmsegmentation(mmseg: Any) -> None:
    logits, labels = scene()
    alone = torch.full_like(labels, VOID)
    alone[0, 3, 3] = 2
    with pytest.raises(IndexError):
        mmseg(reduction="none")(logits, alone, ignore_index=VOID)
    assert LocalLoss(LovaszSoftmax(ignore_index=VOID))(logits, alone).item() > 0


def test_a_label_that_is_no_class_is_background_of_every_class(smp: Any) -> None:
    logits, labels = scene()
    assert smp("multiclass")(logits, labels).isfinite()
    with pytest.raises(Exception, match=r"got 255 at index .*; expected a value in \[0, 4\)"):
        LocalLoss(LovaszSoftmax())(logits, labels)


def test_bool_labels_and_16_bits(smp: Any) -> None:
    logits, labels = scene()
    with pytest.raises(RuntimeError, match="bool"):
        smp("binary")(logits[:, 0], labels == 1)
    with pytest.raises(RuntimeError, match="same dtype"):
        smp("multiclass", ignore_index=VOID)(logits.half(), labels)
    assert LocalLoss(LovaszHinge())(logits[:, 0], labels == 1).isfinite()
    assert LocalLoss(LovaszSoftmax(ignore_index=VOID))(logits.half(), labels).isfinite()


def test_volumes_fail_in_mmsegmentation(mmseg: Any) -> None:
    logits, labels = torch.randn(2, 4, 4, 4, 4), torch.randint(0, 4, (2, 4, 4, 4))
    with pytest.raises(ValueError, match="unpack"):
        mmseg(reduction="none")(logits, labels, ignore_index=VOID)
    assert LocalLoss(LovaszSoftmax())(logits, labels).isfinite()


def test_the_defaults_of_mmsegmentation(mmseg: Any) -> None:
    with pytest.raises(AssertionError, match="reduction should be 'none'"):
        mmseg()
    logits, labels = scene()
    with_weights, without = (
        mmseg(reduction="none")(logits, labels, weight=weight, ignore_index=VOID)
        for weight in (torch.zeros(2, 32, 32), None)
    )
    assert torch.equal(with_weights, without), "weights of pixels have no effect"


def test_multilabel(smp: Any) -> None:
    """The figures of the page's example."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 3, 16, 16, generator=generator) + torch.tensor([3.0, 0.0, -3.0])[:, None, None]
    labels = torch.rand(2, 3, 16, 16, generator=generator) < torch.tensor([0.7, 0.3, 0.02])[:, None, None]
    theirs = (given := logits.clone().requires_grad_(), smp("multilabel")(given, labels.long()))
    ours = (given := logits.clone().requires_grad_(), LocalLoss(LovaszHinge(multilabel=True))(given, labels))
    for _, loss in (theirs, ours):
        loss.backward()
    grads = [pair[0].grad for pair in (theirs, ours)]
    assert [round(pair[1].item(), 2) for pair in (theirs, ours)] == [1.93, 2.92]
    assert round(cosine_similarity(grads[0].flatten(), grads[1].flatten(), dim=0).item(), 2) == 0.31
    assert [round(grad[:, 2].norm().item(), 3) for grad in grads] == [0.007, 0.125]
    as_theirs = LocalLoss(LovaszHinge())(logits.flatten(1), labels.flatten(1))
    assert as_theirs.item() == pytest.approx(theirs[1].item(), rel=1e-5)
