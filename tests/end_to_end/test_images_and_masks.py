"""Binary losses, losses of images, offsets and masks: the bits of ``lovasz.core`` in every way to call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.comparison import bits, normal, random_labels
from support.fork_server import ForkedServer

from lovasz import core
from lovasz.client import (
    BinaryCrossEntropy,
    CrossEntropy,
    InvalidInputError,
    Joint,
    LossClient,
    LovaszHinge,
    LovaszSigmoid,
    LovaszSoftmax,
)
from lovasz.client import remote as client_remote
from lovasz.client.torch import RemoteLoss
from lovasz.core import LocalLoss
from lovasz.server.launch import ServerProcess
from lovasz.spec import InvalidInput, LossLike, Result, weighted_sum

WAYS = ("inprocess", "unary", "stream", "shared memory")


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    path = tmp_path_factory.mktemp("images") / "s"
    with ForkedServer(["--device", "cpu", "--listen", f"unix:{path}", "--shared-memory"]) as server:
        yield server


@pytest.fixture(params=WAYS)
def client(
    request: pytest.FixtureRequest, sharing: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LossClient]:
    monkeypatch.setattr(client_remote, "UNARY_BYTES", 0 if request.param == "stream" else 4 << 20)
    monkeypatch.setattr(client_remote, "SHARED_BYTES", 0)
    transport = "shm" if request.param == "shared memory" else "grpc"
    target = "inprocess" if request.param == "inprocess" else sharing.target
    with LossClient(target, transport=transport) as client:
        yield client


CASES: list[tuple[LossLike, tuple[int, ...], dict[str, Any]]] = [
    (LovaszSigmoid(), (3, 40, 30), {}),
    (
        [(1, BinaryCrossEntropy(pos_weight=[2, 0.5, 1], multilabel=True)), (0.5, LovaszHinge(multilabel=True))],
        (2, 3, 40),
        {},
    ),
    ([(1, BinaryCrossEntropy(3, ignore_index=255)), (1, LovaszSigmoid(per_image=True, ignore_index=255))], (2, 40), {}),
    (LovaszSoftmax(per_image=True), (3, 4, 9, 7), {}),
    (LovaszSoftmax(per_image=True, ignore_index=255), (90, 5), {"offsets": [20, 21, 90]}),
    ([(1, CrossEntropy()), (1, LovaszSoftmax(per_image=True))], (90, 5), {"offsets": np.array([50, 90]), "valid": 0.7}),
    ([(1, CrossEntropy()), (1, LovaszSoftmax())], (2, 5, 9, 7), {"valid": 0.5}),
    ([(1, BinaryCrossEntropy()), (1, LovaszHinge())], (2, 90), {"valid": 0.5}),
]


def tensors(loss: LossLike, shape: tuple[int, ...], options: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    total = weighted_sum(loss)
    void = 255 if any(term.ignore_index == 255 for _, term in total.terms) else None
    label_shape = shape if total.is_binary else (shape[0], *shape[2:])
    labels = random_labels(*label_shape, values=2 if total.is_binary else shape[1], seed=3, void=void)
    if "valid" in options:
        generator = torch.Generator().manual_seed(7)
        options = {**options, "valid": torch.rand(label_shape, generator=generator) < options["valid"]}
    return normal(*shape, seed=1, dtype=torch.float32) * 2, labels, options


@pytest.mark.parametrize(("loss", "shape", "options"), CASES, ids=lambda value: "")
@pytest.mark.parametrize("arrays", [False, True], ids=["torch", "numpy"])
def test_a_client_gives_the_bits_of_the_core(
    client: LossClient, loss: LossLike, shape: tuple[int, ...], options: dict[str, Any], arrays: bool
) -> None:
    logits, labels, options = tensors(loss, shape, options)
    expected = core.compute(logits, labels, loss, **options)
    if arrays:
        logits, labels = logits.numpy(), labels.numpy()
        options = {name: np.asarray(value) for name, value in options.items()}
    result = client.compute(logits, labels, loss, **options)
    grad = torch.as_tensor(result.grad)
    assert bits(Result(result.loss, grad, result.terms, result.intersection, result.union)) == bits(expected)
    for ours, theirs in zip(result.terms, expected.terms, strict=True):
        assert ours.per_image_loss.tobytes() == theirs.per_image_loss.tobytes()
    submitted = client.submit(logits, labels, loss, want_grad=False, **options).result()
    assert submitted.loss == expected.loss


@pytest.mark.parametrize(("loss", "shape", "options"), CASES, ids=lambda value: "")
def test_a_module_gives_the_gradient_of_the_core(
    client: LossClient, loss: LossLike, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    logits, labels, options = tensors(loss, shape, options)
    answers = []
    for criterion in (RemoteLoss(client, loss), LocalLoss(loss)):
        leaf = logits.clone().requires_grad_()
        value = criterion(leaf, labels, **options)
        value.backward()
        answers.append((value.item(), leaf.grad))
    assert answers[0][0] == answers[1][0]
    assert torch.equal(answers[0][1], answers[1][1])


@pytest.mark.parametrize(
    ("loss", "shape", "options"),
    [
        (LovaszSoftmax(per_image=True), (3, 4, 9, 7), {}),
        (LovaszSigmoid(per_image=True), (3, 40), {"valid": 0.6}),
        (LovaszSoftmax(per_image=True), (90, 5), {"offsets": [20, 21, 90]}),
    ],
    ids=["images", "mask", "clouds"],
)
def test_one_loss_an_image(client: LossClient, loss: LossLike, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    logits, labels, options = tensors(loss, shape, options)
    factors, answers = torch.tensor([1.0, -0.5, 2.0]), []
    for criterion in (RemoteLoss(client, loss, reduction="none"), LocalLoss(loss, reduction="none")):
        leaf = logits.clone().requires_grad_()
        losses = criterion(leaf, labels, **options)
        assert losses.shape == (3,)
        (losses * factors).sum().backward()
        answers.append((losses.detach(), leaf.grad))
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])


def test_the_losses_of_images_in_16_bits(client: LossClient) -> None:
    logits = normal(3, 4, 50, seed=1, dtype=torch.float16)
    labels = random_labels(3, 50, values=4, seed=2)
    leaf = logits.clone().requires_grad_()
    losses = RemoteLoss(client, LovaszSoftmax(per_image=True), reduction="none")(leaf, labels)
    losses[1].backward()
    assert losses.dtype == torch.float32
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.float16
    assert leaf.grad[1].any()
    assert not leaf.grad[::2].any()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's own, which it hides elsewhere
def test_compiled_modules_with_these_arguments(client: LossClient) -> None:
    """They are called between two graphs, with the eager values."""
    loss, shape, options = CASES[5]
    logits, labels, options = tensors(loss, shape, options)
    for criterion in (RemoteLoss(client, loss), LocalLoss(loss)):

        def step(leaf: torch.Tensor, criterion: torch.nn.Module = criterion) -> torch.Tensor:
            value: torch.Tensor = criterion(leaf * 2, labels, **options) * 3
            return value

        answers = []
        for function in (step, torch.compile(step, backend="aot_eager")):
            leaf = logits.clone().requires_grad_()
            value = function(leaf)
            value.backward()
            answers.append((value.item(), leaf.grad))
        assert answers[0][0] == answers[1][0]
        assert torch.equal(answers[0][1], answers[1][1])


def test_what_does_not_fit_is_refused(client: LossClient) -> None:
    logits, labels = torch.zeros(2, 3, 9), torch.zeros(2, 9, dtype=torch.uint8)
    with pytest.raises(InvalidInputError, match=r"^offsets: got 1 as the last one; expected ascending integers"):
        client.compute(logits, labels, LovaszSoftmax(per_image=True), offsets=[1])
    with pytest.raises(InvalidInputError, match=r"^valid: got element type torch.float32; expected bool"):
        client.compute(logits, labels, LovaszSoftmax(), valid=torch.ones(2, 9))
    with pytest.raises(InvalidInputError, match=r"^pos_weight: got 2 numbers; expected 3, one per label"):
        client.compute(logits, logits.byte(), BinaryCrossEntropy([1, 2], multilabel=True))
    with pytest.raises(InvalidInput, match=r"^reduction: got 'none' with CrossEntropy"):
        RemoteLoss(client, CrossEntropy(), reduction="none")
    with pytest.raises(ValueError, match=r"^reduction: got 'none' with joint; expected 'mean', or no joint"):
        RemoteLoss(client, LovaszSoftmax(per_image=True), joint=Joint("r", 0, 1), reduction="none")


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ([(1, BinaryCrossEntropy(2)), (1, LovaszSigmoid())], {}),
        ([(1, BinaryCrossEntropy()), (1, LovaszHinge(per_image=True))], {"valid": 0.6}),
        (LovaszSigmoid(per_image=True), {"offsets": [10, 25]}),
    ],
    ids=["sigmoid", "mask", "offsets"],
)
def test_the_joint_loss_of_ranks(server: ServerProcess, loss: LossLike, options: dict[str, Any]) -> None:
    """Bit for bit that of one request with all images; clouds that lie on one rank stay whole."""
    logits, labels, options = tensors(loss, (40, 12), options)
    whole = {**options, "offsets": [10, 25, 30, 40]} if "offsets" in options else options
    expected = core.compute(logits, labels, loss, **whole)
    parts, valid = [slice(0, 25), slice(25, 40)], options.get("valid")
    of_ranks: list[dict[str, Any]] = [{} if valid is None else {"valid": valid[part]} for part in parts]
    if "offsets" in options:
        of_ranks = [{"offsets": [10, 25]}, {"offsets": [5, 15]}]
    with LossClient(server.target) as client:
        pending = [
            client.submit(logits[part], labels[part], loss, joint=Joint("images", rank, 2, step=0), **own)
            for rank, (part, own) in enumerate(zip(parts, of_ranks, strict=True))
        ]
        results = [future.result() for future in pending]
    assert expected.grad is not None
    for part, result in zip(parts, results, strict=True):
        assert result.loss == expected.loss
        assert torch.equal(result.grad, expected.grad[part])
    images = np.concatenate([result.terms[-1].per_image_loss for result in results])
    assert images.tolist() == expected.terms[-1].per_image_loss.tolist()
