"""What only a GPU can show: work that is queued without waiting, memory that comes back, bits that stay."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.comparison import bits, normal, random_labels
from torch import Tensor

from lovasz.core import BinaryCrossEntropy, CrossEntropy, LocalLoss, LovaszHinge, LovaszSigmoid, LovaszSoftmax, compute
from lovasz.core.batch import Request
from lovasz.core.dispatch import submit
from lovasz.spec import LossLike, Result, WeightedSum, weighted_sum

pytestmark = pytest.mark.gpu

VOID = 255
LOSSES: list[LossLike] = [
    LovaszSoftmax(ignore_index=VOID),
    LovaszSoftmax(classes=[0, 3], class_weights=[1.0, 2.0, 0.0, 0.5], per_image=True, ignore_index=VOID),
    LovaszSoftmax(input="probabilities", ignore_index=VOID),
    [
        (1.0, CrossEntropy(class_weights=[1.0, 2.0, 0.0, 0.5], ignore_index=VOID, label_smoothing=0.1)),
        (1.0, LovaszSoftmax(classes="all", ignore_index=VOID)),
    ],
    LovaszHinge(multilabel=True, ignore_index=VOID),
    LovaszHinge(multilabel=True, per_image=True, ignore_index=VOID),
    [
        (1.0, BinaryCrossEntropy(pos_weight=2.0, multilabel=True, ignore_index=VOID)),
        (0.5, LovaszSigmoid(multilabel=True, per_image=True, ignore_index=VOID)),
    ],
]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: weighted_sum(loss).kind)


def set_sync_debug_mode(mode: str) -> None:
    """The function itself warns that it is a prototype; the mode is set all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)


@pytest.fixture
def no_waiting(cuda: torch.device) -> Iterator[None]:
    """Any wait of the host for the device is an error."""
    torch.cuda.synchronize()
    try:
        set_sync_debug_mode("error")
        yield
    finally:
        set_sync_debug_mode("default")


def batch_of(loss: WeightedSum, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    members = []
    for seed, (images, height, width) in enumerate([(1, 64, 80), (3, 16, 16), (2, 1, 1)]):
        logits = normal(images, 4, height, width, seed=seed, dtype=torch.float32)
        shape = logits.shape if loss.is_binary else (images, height, width)
        labels = random_labels(*shape, values=2 if loss.is_binary else 4, seed=seed, void=VOID)
        members.append(((logits.softmax(1) if loss.probabilities else logits).to(device), labels.to(device)))
    return members


@pytest.fixture
def graphs(cuda: torch.device) -> Iterator[Any]:
    """The recorded graphs: none before, and none behind."""
    from lovasz.core.backends.triton import graphs  # needs triton

    graphs.GRAPHS.clear()
    yield graphs.GRAPHS
    graphs.GRAPHS.clear()


@each_loss
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("want_grad", [False, True])
def test_launch_does_not_wait_for_the_device(
    loss: LossLike, size: int, want_grad: bool, cuda: torch.device, request: pytest.FixtureRequest
) -> None:
    total = weighted_sum(loss)
    members = batch_of(total, cuda)[:size]
    expected = [compute(logits, labels, total, want_grad=want_grad) for logits, labels in members]
    request.getfixturevalue("no_waiting")
    requests = [Request.checked(logits, labels, total) for logits, labels in members]
    launched = submit(requests, total, cuda, want_grad=want_grad)
    set_sync_debug_mode("default")
    answers = launched.collect()
    assert [bits(answer) for answer in answers if isinstance(answer, Result)] == [bits(answer) for answer in expected]


@each_loss
def test_memory_comes_back(loss: LossLike, cuda: torch.device, graphs: Any) -> None:
    """All but what is kept for the next batch of the kind: a program, and a graph once there is one."""
    members = batch_of(weighted_sum(loss), cuda)
    for logits, labels in members * 4:
        compute(logits, labels, loss)
    before = torch.cuda.memory_allocated()
    for logits, labels in members * 3:
        compute(logits, labels, loss)
    assert torch.cuda.memory_allocated() == before
    graphs.clear()
    assert torch.cuda.memory_allocated() <= before


@each_loss
def test_graphs_are_used_bounded_and_right(
    loss: LossLike, cuda: torch.device, graphs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers of a graph are those of the launches to the bit, from whichever addresses; the oldest graph goes."""
    monkeypatch.setattr("lovasz.core.backends.triton.graphs.KEPT_GRAPHS", 2)
    members = batch_of(weighted_sum(loss), cuda)
    expected = [bits(compute(logits, labels, loss)) for logits, labels in members]
    for _ in range(4):
        copies = [(logits.clone(), labels.clone()) for logits, labels in members]
        assert [bits(compute(logits, labels, loss)) for logits, labels in copies] == expected
        assert len(graphs) <= 2
    assert len(graphs) == 2


def test_memory_of_graphs_that_were_dropped_is_used_again(
    cuda: torch.device, graphs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is allocated while a graph is captured would belong to that graph alone."""
    monkeypatch.setattr("lovasz.core.backends.triton.graphs.KEPT_GRAPHS", 2)

    def reserved_after(width: int) -> int:
        logits = normal(1, 4, 300, width, seed=width, dtype=torch.float32).to(cuda)
        labels = random_labels(1, 300, width, values=4, seed=width).to(cuda)
        for _ in range(5):
            compute(logits, labels, LovaszSoftmax())
        return torch.cuda.memory_reserved()

    reserved = [reserved_after(width) for width in range(300, 340)]
    assert len(graphs) == 2
    assert reserved[-1] <= reserved[9] + (16 << 20)


@pytest.mark.parametrize("uses", [0, 5], ids=["unseen", "recorded"])
def test_a_loss_in_a_callers_graph_is_refused_and_does_no_harm(uses: int, cuda: torch.device, graphs: Any) -> None:
    loss = LovaszSoftmax(ignore_index=VOID)
    (logits, labels), *_ = batch_of(weighted_sum(loss), cuda)
    leaf = logits.clone().requires_grad_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(uses):
            LocalLoss(loss)(leaf, labels).backward()

    def capture() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            LocalLoss(loss)(2 * leaf, labels)  # A graph without any work warns.

    with pytest.raises(RuntimeError, match="cannot be captured"):
        capture()
    results = []
    for own in (stream, torch.cuda.Stream()):
        with torch.cuda.stream(own):
            results += [compute(logits, labels, loss) for _ in range(5)]
    assert len({bits(result) for result in results}) == 1
    assert results[0].loss == pytest.approx(compute(logits.cpu(), labels.cpu(), loss).loss, rel=1e-6)


def test_graphs_serve_calls_inside_and_outside_of_inference_mode(cuda: torch.device, graphs: Any) -> None:
    loss = LovaszSoftmax(ignore_index=VOID)
    (logits, labels), *_ = batch_of(weighted_sum(loss), cuda)
    with torch.inference_mode():
        (expected,) = {bits(compute(logits, labels, loss)) for _ in range(4)}
    assert len(graphs) == 1
    assert bits(compute(logits, labels, loss)) == expected


def test_default_device_may_be_the_gpu(cuda: torch.device, graphs: Any) -> None:
    loss = LovaszSoftmax(ignore_index=VOID)
    (logits, labels), *_ = batch_of(weighted_sum(loss), cuda)
    expected = bits(compute(logits, labels, loss))
    with torch.device(cuda):
        assert {bits(compute(logits, labels, loss)) for _ in range(4)} == {expected}


@each_loss
def test_loss_of_autograd_is_that_of_compute(loss: LossLike, cuda: torch.device) -> None:
    for logits, labels in batch_of(weighted_sum(loss), cuda):
        expected = compute(logits, labels, loss)
        for _ in range(4):  # launched, and from a graph
            leaf = logits.clone().requires_grad_()
            value = LocalLoss(loss)(leaf, labels)
            value.backward()
            assert value.item() == pytest.approx(expected.loss, rel=1e-6)
            assert torch.equal(leaf.grad, expected.grad)


@each_loss
def test_run_to_run_no_bit_changes_on_a_large_batch(loss: LossLike, cuda: torch.device) -> None:
    total = weighted_sum(loss)
    logits = normal(2, 4, 512, 512, seed=1, dtype=torch.float32).to(cuda)
    logits = logits.softmax(1) if total.probabilities else logits
    shape = logits.shape if total.is_binary else (2, 512, 512)
    labels = random_labels(*shape, values=2 if total.is_binary else 4, seed=2, void=VOID).to(cuda)
    assert len({bits(compute(logits, labels, loss)) for _ in range(5)}) == 1


@each_loss
def test_inputs_from_the_host_give_the_same_bits(loss: LossLike, cuda: torch.device) -> None:
    total = weighted_sum(loss)
    for logits, labels in batch_of(total, cuda):
        expected = bits(compute(logits, labels, loss))
        for host in ((logits.cpu(), labels.cpu()), (logits.cpu().pin_memory(), labels.cpu().pin_memory())):
            (answer,) = submit([Request.checked(*host, total)], total, cuda).collect()
            assert isinstance(answer, Result)
            assert bits(answer) == expected
