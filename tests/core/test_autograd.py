"""The losses as nodes of torch's graph: gradients, gradient scaling, autocast, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from support.comparison import norm_error, normal, random_labels, reference_answer
from support.ways import Way
from torch import Tensor

from lovasz.core import (
    BinaryCrossEntropy,
    CrossEntropy,
    LocalLoss,
    LovaszHinge,
    LovaszHingeLoss,
    LovaszSigmoid,
    LovaszSigmoidLoss,
    LovaszSoftmax,
    LovaszSoftmaxLoss,
    compute,
    lovasz_hinge,
    lovasz_softmax,
)
from lovasz.spec import InvalidInput, LossLike

SOFTMAX_LOSSES: list[LossLike] = [
    LovaszSoftmax(),
    LovaszSoftmax(classes="all", per_image=True, ignore_index=1),
    LovaszSoftmax(classes=[2, 0], class_weights=[0.5, 1.0, 2.0]),
    CrossEntropy(class_weights=[0.5, 1.0, 2.0], label_smoothing=0.1),
    [(0.5, CrossEntropy()), (2.0, LovaszSoftmax(per_image=True)), (-1.0, LovaszSoftmax(classes=[1]))],
]


@pytest.mark.parametrize("loss", SOFTMAX_LOSSES, ids=str)
def test_gradcheck_softmax(loss: LossLike, torch_device: torch.device) -> None:
    logits = normal(2, 3, 2, 3, seed=3).to(torch_device).requires_grad_()  # random, so without ties
    labels = random_labels(2, 2, 3, values=3, seed=4).to(torch_device)
    assert torch.autograd.gradcheck(lambda x: LocalLoss(loss)(x, labels), logits)


def test_gradcheck_probabilities(torch_device: torch.device) -> None:
    probabilities = normal(2, 3, 2, 3, seed=3).softmax(1).to(torch_device).requires_grad_()
    labels = random_labels(2, 2, 3, values=3, seed=4).to(torch_device)
    assert torch.autograd.gradcheck(lambda x: lovasz_softmax(x, labels, input="probabilities"), probabilities)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("multilabel", [False, True])
def test_gradcheck_hinge(per_image: bool, multilabel: bool, torch_device: torch.device) -> None:
    logits = normal(2, 3, 7, seed=5).to(torch_device).requires_grad_()
    labels = random_labels(2, 3, 7, values=2, seed=6, void=9).to(torch_device)
    options = {"per_image": per_image, "multilabel": multilabel, "ignore_index": 9}
    assert torch.autograd.gradcheck(lambda x: lovasz_hinge(x, labels, **options), logits)


HINGE_LOSSES: list[LossLike] = [
    LovaszHinge(multilabel=True),
    [(0.5, LovaszHinge(multilabel=True, per_image=True, ignore_index=1)), (-2.0, LovaszHinge(multilabel=True))],
    [(0.5, LovaszSigmoid(multilabel=True)), (2.0, BinaryCrossEntropy([1.0, 3.0, 0.0], multilabel=True))],
]


@pytest.mark.parametrize("loss", SOFTMAX_LOSSES + HINGE_LOSSES, ids=str)
def test_value_and_gradient_are_those_of_compute(loss: LossLike, way: Way, device: torch.device) -> None:
    logits = normal(2, 3, 9, 7, seed=31, dtype=torch.float32).to(device)
    shape = (2, 3, 9, 7) if loss in HINGE_LOSSES else (2, 9, 7)
    labels = random_labels(*shape, values=2, seed=32).to(device)
    expected = compute(logits, labels, loss)
    leaf = logits.clone().requires_grad_()
    value = LocalLoss(loss)(leaf, labels)
    value.backward()
    assert value.item() == pytest.approx(expected.loss, rel=1e-6)
    assert leaf.grad is not None
    assert expected.grad is not None
    assert torch.equal(leaf.grad, expected.grad)


def some_input(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    logits = normal(2, 3, 4, 4, seed=7, dtype=dtype).to(device).requires_grad_()
    return logits, random_labels(2, 4, 4, values=3, seed=8).to(device)


@pytest.mark.parametrize(
    ("dtype", "loss_dtype"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes_of_loss_and_gradient(dtype: torch.dtype, loss_dtype: torch.dtype, device: torch.device) -> None:
    logits, labels = some_input(device, dtype)
    loss = lovasz_softmax(logits, labels)
    loss.backward()
    assert loss.dtype == loss_dtype
    assert loss.device == logits.device
    assert logits.grad is not None
    assert logits.grad.dtype == dtype


def test_where_no_gradient_is_wanted_the_loss_requires_none(device: torch.device) -> None:
    logits, labels = some_input(device)
    expected = lovasz_softmax(logits, labels)
    assert expected.requires_grad
    with torch.no_grad():
        without_grad = lovasz_softmax(logits, labels)
    with torch.inference_mode():
        inference = lovasz_softmax(logits, labels)
    constant = lovasz_softmax(logits.detach(), labels)
    for loss in (without_grad, inference, constant):
        assert not loss.requires_grad
        assert loss.grad_fn is None
        assert loss.item() == expected.item()


def test_backward_twice_with_retain_graph_adds_the_same_again(device: torch.device) -> None:
    logits, labels = some_input(device)
    loss = lovasz_softmax(logits, labels)
    loss.backward(retain_graph=True)
    assert logits.grad is not None
    once = logits.grad.clone()
    loss.backward()
    assert torch.equal(logits.grad, 2 * once)


def test_backward_twice_without_retain_graph_is_refused_by_torch(device: torch.device) -> None:
    logits, labels = some_input(device)
    loss = lovasz_softmax(logits, labels)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_gradient_follows_what_is_done_with_the_loss(torch_device: torch.device) -> None:
    logits, labels = some_input(torch_device, torch.float64)
    (plain,) = torch.autograd.grad(lovasz_softmax(logits, labels), logits)
    loss = lovasz_softmax(logits, labels)
    (grad,) = torch.autograd.grad(3 * loss**2, logits)
    torch.testing.assert_close(grad, 6 * loss.detach() * plain)


def test_double_backward_is_refused(device: torch.device) -> None:
    logits, labels = some_input(device)
    (grad,) = torch.autograd.grad(lovasz_softmax(logits, labels) ** 2, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward through this loss is not supported"):
        torch.autograd.grad(grad.sum(), logits)


def test_gradient_penalty_is_refused(device: torch.device) -> None:
    logits, labels = some_input(device)
    loss = lovasz_softmax(logits, labels)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward through this loss is not supported"):
        (loss + grad.norm()).backward()


@pytest.mark.parametrize("retain_graph", [False, True])
@pytest.mark.parametrize("offsets", [None, [1, 2]])
def test_gradients_of_several_losses_at_once(
    offsets: list[int] | None, retain_graph: bool, device: torch.device
) -> None:
    logits, labels = some_input(device)

    def losses() -> Tensor:
        return lovasz_softmax(logits, labels, per_image=True, offsets=offsets, reduction="none")

    count = losses().shape[0]
    weights = torch.randn(3, count, device=device)
    (together,) = torch.autograd.grad(losses(), logits, weights, is_grads_batched=True, retain_graph=retain_graph)
    alone = [torch.autograd.grad(losses(), logits, weight)[0] for weight in weights]
    torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=0)


def test_a_jacobian_in_one_pass(device: torch.device) -> None:
    logits, labels = some_input(device)
    jacobian = torch.autograd.functional.jacobian(lambda x: lovasz_softmax(x, labels), logits, vectorize=True)
    (expected,) = torch.autograd.grad(lovasz_softmax(logits, labels), logits)
    torch.testing.assert_close(jacobian, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scaled_gradient_of_16_bit_logits_does_not_underflow(
    dtype: torch.dtype, way: Way, device: torch.device
) -> None:
    way.require_speed(4 * 300 * 300)
    scale = 65536.0
    logits = normal(1, 4, 300, 300, seed=9, dtype=dtype).to(device).requires_grad_()
    labels = random_labels(1, 300, 300, values=4, seed=10).to(device)
    _, expected = reference_answer(logits, labels, LovaszSoftmax())
    (lovasz_softmax(logits, labels) * scale).backward()
    assert logits.grad is not None
    assert expected.abs().median() < 2e-6  # of float16's steps there, 6e-8 wide, few are left
    assert norm_error(logits.grad, expected * scale) < 2 * torch.finfo(dtype).eps


def test_under_autocast_the_loss_is_that_of_the_logits_alone(device: torch.device) -> None:
    torch.manual_seed(11)
    model = torch.nn.Conv2d(3, 4, 3, padding=1).to(device)
    images, labels = torch.randn(2, 3, 8, 8, device=device), random_labels(2, 8, 8, values=4, seed=12).to(device)
    mix = LocalLoss([(1.0, CrossEntropy(label_smoothing=0.1)), (1.0, LovaszSoftmax())])
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logits = model(images)
        loss = mix(logits, labels)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert torch.equal(loss, mix(logits.detach(), labels))
    loss.backward()
    assert model.weight.grad is not None
    assert model.weight.grad.isfinite().all()
    assert model.weight.grad.norm() > 0
    with torch.autocast(device.type, dtype=torch.bfloat16):
        double = mix(logits.detach().double(), labels)
    assert torch.equal(double, mix(logits.detach().double(), labels))


def test_a_scaler_sees_the_nan_of_a_logit_that_is_not_finite(device: torch.device) -> None:
    logits, labels = some_input(device)
    with torch.no_grad():
        logits[0, 0, 0, 0] = math.inf
    lovasz_softmax(logits, labels).backward()
    assert logits.grad is not None
    assert logits.grad.isnan().all()


def test_one_step_of_training_lowers_the_loss(device: torch.device) -> None:
    logits, labels = some_input(device)
    before = lovasz_softmax(logits, labels)
    before.backward()
    with torch.no_grad():
        logits -= logits.grad / logits.grad.norm()
    assert lovasz_softmax(logits, labels) < before


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (LovaszSoftmaxLoss(ignore_index=255), "1.0 * LovaszSoftmax(classes='present', class_weights=None, "),
        (LovaszHingeLoss(per_image=True), "1.0 * LovaszHinge(per_image=True, "),
        (LocalLoss([(0.5, CrossEntropy()), (2.0, LovaszSoftmax())]), "0.5 * CrossEntropy("),
    ],
)
def test_modules_say_what_they_compute(module: LocalLoss, text: str) -> None:
    assert text in repr(module)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: LovaszSoftmaxLoss(classes=[]), "classes: got an empty list"),
        (lambda: LovaszHingeLoss(ignore_index=1.5), "ignore_index: got 1.5; expected an integer"),
        (lambda: LocalLoss([(1.0, LovaszHinge()), (1.0, CrossEntropy())]), "loss: LovaszHinge is combined with"),
        (lambda: LocalLoss(LovaszSoftmax(), reduction="none"), "reduction: got 'none' with LovaszSoftmax"),
        (lambda: LocalLoss(LovaszSoftmax(), group="wrld"), "group: got 'wrld'; expected a process group of torch"),
    ],
)
def test_modules_refuse_bad_options_when_built(build: Callable[[], LocalLoss], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        build()


def test_what_other_losses_take_is_refused_with_its_cure() -> None:
    logits, labels = torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64)
    criterion = LocalLoss(LovaszSoftmax())
    with pytest.raises(TypeError, match=r"^LocalLoss: got 3 positional arguments; .* no pixel weights .*valid="):
        criterion(logits, labels, torch.ones(2, 4))
    with pytest.raises(InvalidInput, match=r"^logits: got dict; expected a torch tensor \(pass one of its tensors"):
        criterion({"out": logits}, labels)
    with pytest.raises(InvalidInput, match=r"^logits: got SimpleNamespace; .* \(pass its logits: outputs.logits\)$"):
        criterion(SimpleNamespace(logits=logits), labels)
    with pytest.raises(InvalidInput, match=r"^labels: got list; .* \(torch.as_tensor makes one of a list\)$"):
        criterion(logits, [[0, 1, 2, 0]] * 2)
    with pytest.raises(InvalidInput, match=r"^per_image: got Tensor of shape \(2, 4\); .*by name: valid=\.\.\.\)$"):
        lovasz_hinge(logits[:, 0], labels, torch.ones(2, 4))  # type: ignore[arg-type]


def test_modules_of_one_loss_take_a_reduction() -> None:
    logits, labels = normal(2, 3, 4, seed=1), random_labels(2, 4, values=3, seed=2)
    losses = LovaszSoftmaxLoss(per_image=True, reduction="none")(logits, labels)
    assert losses.shape == (2,)
    for kind in (LovaszHingeLoss, LovaszSigmoidLoss):
        assert kind(per_image=True, reduction="none")(logits[:, 0], labels % 2).shape == (2,)
