"""Joint steps through a real server in which ranks have no images, cannot take part, have left, or evaluate alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import uneven_ranks
from support.fork_server import Forked, ForkedServer
from support.many_ranks import tensors
from support.scrape import metric
from support.uneven_ranks import IMAGES, LOSS, WORLD, batch, model
from support.waiting import eventually

from lovasz.client import (
    CallAbortedError,
    CrossEntropy,
    InvalidInputError,
    Joint,
    LossClient,
    LovaszHinge,
    LovaszSoftmax,
    Result,
)
from lovasz.client.torch import RemoteLoss
from lovasz.core import LocalLoss
from lovasz.server.launch import ServerProcess
from lovasz.spec import LossLike

SOFTMAX = LovaszSoftmax()
Tensors = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that waits long for ranks: what ends sooner was ended by something else."""
    path = tmp_path_factory.mktemp("absent") / "s"
    arguments = ["--device", "cpu", "--listen", f"127.0.0.1:0,unix:{path}", "--shared-memory"]
    with ForkedServer([*arguments, "--joint-timeout", "600"]) as server:
        yield server


def some_images(images: int, *, channels: int = 4, hinge: bool = False, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, channels, 6, 5, generator=generator)
    return logits, torch.randint(0, 2 if hinge else channels, (images, 6, 5), generator=generator)


def waiting_ranks(server: ServerProcess) -> float:
    return metric(server, "lovasz_joint_ranks_waiting")


# --- Ranks without images -----------------------------------------------------------------------------------------

LOSSES: dict[str, tuple[LossLike, int]] = {
    "softmax": (SOFTMAX, 4),
    "per image": ([(1.0, CrossEntropy()), (1.0, LovaszSoftmax(per_image=True, classes="all"))], 4),
    "hinge": (LovaszHinge(per_image=True), 1),
}


@pytest.mark.parametrize("transport", ["grpc", "shm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_rank_without_images_gets_the_loss_of_the_others(
    server: ServerProcess, name: str, dtype: torch.dtype, transport: str
) -> None:
    loss, channels = LOSSES[name]
    parts = [some_images(images, channels=channels, hinge=channels == 1, seed=images) for images in (2, 0, 1)]
    parts = [(logits.to(dtype), labels) for logits, labels in parts]
    target = server.targets[transport == "shm"]
    with LossClient(target, transport=transport) as client, ThreadPoolExecutor(3) as pool:
        run = f"{name} {dtype} {transport}"
        calls = [
            pool.submit(client.compute, *part, loss, joint=Joint(run, rank, 3, step=0))
            for rank, part in enumerate(parts)
        ]
        answers = [call.result() for call in calls]
        whole = client.compute(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), loss)
    grads = whole.grad.split([2, 0, 1])
    for answer, grad in zip(answers, grads, strict=True):
        assert answer.loss == whole.loss
        assert answer.ranks == 3
        assert np.array_equal(answer.class_iou, whole.class_iou)
        assert answer.grad.dtype == grad.dtype
        assert torch.equal(answer.grad, grad)
    assert answers[1].grad.shape == (0, channels, 6, 5)


def test_the_loss_of_one_pixel_and_nothing_is_that_of_the_pixel(server: ServerProcess) -> None:
    """One pixel of the first of two classes: the loss is the probability of the other."""
    loss = 0.709902078
    logits, labels = np.array([[0.0, math.log(loss / (1 - loss))]], np.float32), np.array([0])
    with LossClient(server.target) as client:
        other = client.submit(logits[:0], labels[:0], SOFTMAX, joint=Joint("a pixel", 1, 2, step=0))
        result = client.compute(logits, labels, SOFTMAX, joint=Joint("a pixel", 0, 2, step=0))
        assert result.loss == pytest.approx(loss, rel=1e-7)
        assert other.result().loss == result.loss == client.compute(logits, labels, SOFTMAX).loss
        assert other.result().grad.shape == (0, 2)


def test_ranks_that_all_have_no_images_get_0_and_alone_none_is_refused(server: ServerProcess) -> None:
    nothing = some_images(0)
    with LossClient(server.target) as client:
        first = client.submit(*nothing, SOFTMAX, joint=Joint("nothing", 0, 2, step=0))
        second = client.submit(*nothing, SOFTMAX, joint=Joint("nothing", 1, 2, step=0))
        for result in (first.result(), second.result()):
            assert result.loss == 0
            assert np.isnan(result.class_iou).all()
            assert result.grad.shape == nothing[0].shape
        with pytest.raises(InvalidInputError, match="which holds no element"):
            client.compute(*nothing, SOFTMAX)
    for dtype in (torch.float32, torch.float64):
        logits = nothing[0].to(dtype, copy=True).requires_grad_()
        loss = RemoteLoss("inprocess", SOFTMAX, joint=Joint("nothing", 0, 1))(logits, nothing[1])
        loss.backward()
        assert (loss.item(), loss.dtype) == (0.0, dtype)
        assert logits.grad is not None


def test_a_module_with_an_empty_batch_gives_the_model_a_gradient_of_0(server: ServerProcess) -> None:
    nets = [model(), model()]

    def work(rank: int) -> tuple[float, torch.Tensor]:
        net = nets[rank]
        images, labels = batch(0, 0, rank)  # Two images, and none.
        criterion = RemoteLoss(server.target, SOFTMAX, joint=Joint("empty batch", rank, 2), gradient_reduction="sum")
        loss = criterion(net(images), labels)
        loss.backward()
        criterion.close()
        grads = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
        return loss.item(), torch.cat([grad.flatten() for grad in grads])

    with ThreadPoolExecutor(2) as pool:
        (loss, grad), (same, nothing) = pool.map(work, range(2))
    assert loss == same
    assert not nothing.any()
    net = model()
    images, labels = batch(0, 0, 0)
    LocalLoss(SOFTMAX)(net(images), labels).backward()
    own = [parameter.grad.flatten() for parameter in net.parameters() if parameter.grad is not None]
    torch.testing.assert_close(grad, torch.cat(own))


# --- Ranks that cannot take part ----------------------------------------------------------------------------------


class Unreadable:
    """An array of another framework whose memory was lost."""

    shape, dtype = (1, 4, 6, 5), np.dtype(np.float32)

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise RuntimeError("the device is gone")


GOOD = some_images(1)
BAD: dict[str, tuple[Callable[[LossClient, Joint], Any], type[Exception], str]] = {
    "shape": (lambda c, j: c.compute(GOOD[0], GOOD[1][0, 0], SOFTMAX, joint=j), InvalidInputError, "labels: got shape"),
    "dtype": (lambda c, j: c.compute(GOOD[0].int(), GOOD[1], SOFTMAX, joint=j), InvalidInputError, "logits: got dtype"),
    "labels": (
        lambda c, j: c.compute(GOOD[0], GOOD[1] + 0.5, SOFTMAX, joint=j),
        InvalidInputError,
        "labels: got .*; expected whole numbers",
    ),
    "loss": (
        lambda c, j: c.compute(*GOOD, [(math.nan, SOFTMAX)], joint=j),
        InvalidInputError,
        "weight",
    ),
    "encoding": (lambda c, j: c.compute(Unreadable(), GOOD[1], SOFTMAX, joint=j), Exception, "the device is gone"),
    "submitted": (
        lambda c, j: c.submit(GOOD[0], GOOD[1][0, 0], SOFTMAX, joint=j),
        InvalidInputError,
        "labels: got shape",
    ),
    "module": (
        lambda c, j: RemoteLoss(c, SOFTMAX, joint=j)(GOOD[0].clone().requires_grad_(), GOOD[1][0, 0]),
        InvalidInputError,
        "labels: got shape",
    ),
    "no tensor": (
        lambda c, j: RemoteLoss(c, SOFTMAX, joint=j)(GOOD[0].numpy(), GOOD[1]),
        InvalidInputError,
        "logits: got ndarray",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_client_refuses_ends_the_step_for_the_other_ranks(server: ServerProcess, name: str) -> None:
    fail, kind, text = BAD[name]
    run = f"refused {name}"
    with LossClient(server.target) as client, LossClient(server.target) as other:
        waiting = other.submit(*GOOD, SOFTMAX, joint=Joint(run, 0, 3, step=4))
        assert eventually(lambda: waiting_ranks(server) == 1)
        with pytest.raises(kind, match=text):
            fail(client, Joint(run, 1, 3, step=4))
        for late in (waiting, other.submit(*GOOD, SOFTMAX, joint=Joint(run, 2, 3, step=4))):
            with pytest.raises(CallAbortedError, match=f"rank 1: .*{text}"):
                late.result()
        again = [other.submit(*GOOD, SOFTMAX, joint=Joint(run, rank, 3, step=4)) for rank in range(3)]
        assert len({call.result().loss for call in again}) == 1


def test_a_rank_that_fails_before_its_call_can_say_so(server: ServerProcess) -> None:
    with LossClient(server.target) as client:
        waiting = client.submit(*GOOD, SOFTMAX, want_grad=False, joint=Joint("fails", 0, 2, step=0))
        assert eventually(lambda: waiting_ranks(server) == 1)
        assert client.abort(Joint("fails", 1, 2, step=0), "out of memory", want_grad=False)
        with pytest.raises(CallAbortedError, match="rank 1: out of memory"):
            waiting.result()
        waiting = client.submit(*GOOD, SOFTMAX, joint=Joint("fails", 0, 2, step=7))
        assert eventually(lambda: waiting_ranks(server) == 1)
        assert RemoteLoss(client, SOFTMAX, joint=Joint("fails", 1, 2, step=7)).abort("an image is gone")
        with pytest.raises(CallAbortedError, match="rank 1: an image is gone"):
            waiting.result()
        assert not RemoteLoss(client, SOFTMAX).abort("no joint")


@pytest.mark.parametrize("target", ["127.0.0.1:9", "unix:/nowhere", "inprocess"])
def test_a_rank_that_reaches_no_server_raises_its_own_error(target: str) -> None:
    with LossClient(target) as client, pytest.raises(InvalidInputError, match=r"labels: got shape|inprocess"):
        client.compute(GOOD[0], GOOD[1][0, 0], SOFTMAX, joint=Joint("unreachable", 0, 2, step=0))
    if target != "inprocess":
        with LossClient(target) as client:
            assert not client.abort(Joint("unreachable", 0, 2, step=0), "reason")


# --- Ranks that leave ---------------------------------------------------------------------------------------------


def test_a_rank_whose_data_end_leaves_and_comes_again_in_the_next_round(server: ServerProcess) -> None:
    counts = ((3, 1, 0), (1, 2, 2))
    """Batches by round and rank."""

    def part_of(round_number: int, rank: int, number: int) -> Tensors:
        return some_images(1 + rank, seed=100 * round_number + 10 * rank + number)

    def work(rank: int) -> list[list[tuple[float, int, torch.Tensor]]]:
        criterion = RemoteLoss(
            server.target, SOFTMAX, joint=Joint("uneven", rank, 3), gradient_reduction="active_mean", timeout=120
        )
        rounds = []
        for round_number, batches in enumerate(counts):
            found = []
            for number in range(batches[rank]):
                logits, labels = part_of(round_number, rank, number)
                loss = criterion(logits.requires_grad_(), labels)
                loss.backward()
                assert criterion.result is not None
                assert logits.grad is not None
                found.append((loss.item(), criterion.result.ranks, logits.grad))
            criterion.leave()
            rounds.append(found)
        with torch.no_grad():  # All have left: all are there again.
            assert criterion(*GOOD).item() > 0
            assert criterion.result is not None
            assert criterion.result.ranks == 3
        criterion.leave()
        criterion.close()
        return rounds

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(work, range(3)))
    for round_number, batches in enumerate(counts):
        for number in range(max(batches)):
            ranks = [rank for rank in range(3) if number < batches[rank]]
            parts = [part_of(round_number, rank, number) for rank in ranks]
            logits = torch.cat([part[0] for part in parts]).requires_grad_()
            whole = LocalLoss(SOFTMAX)(logits, torch.cat([part[1] for part in parts]))
            whole.backward()
            assert logits.grad is not None
            for rank, grad in zip(ranks, logits.grad.split([1 + rank for rank in ranks]), strict=True):
                loss, present, found = answers[rank][round_number][number]
                assert (loss, present) == (whole.item(), len(ranks))
                assert torch.equal(found, grad * len(ranks))


def test_the_steps_that_a_caller_numbers_are_those_from_which_a_rank_leaves(server: ServerProcess) -> None:
    first, second = (RemoteLoss(server.target, SOFTMAX, joint=Joint("numbered", rank, 2)) for rank in range(2))
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(second, *GOOD, step=41)
        first(*GOOD, step=41)
        other.result()
        with LossClient(server.target) as client:
            earlier = client.submit(*GOOD, SOFTMAX, want_grad=False, joint=Joint("numbered", 0, 2, step=40))
            assert eventually(lambda: waiting_ranks(server) == 1)
            second.leave()
            first(*GOOD, step=42)
            assert waiting_ranks(server) == 1, "a step before it left waits for it"
            client.close(cancel=True)
            with pytest.raises(Exception, match="closed"):
                earlier.result()
    first.leave()
    first.close()
    second.close()


def test_a_module_without_joint_has_nothing_to_leave() -> None:
    RemoteLoss("localhost:1", SOFTMAX).leave()
    RemoteLoss("inprocess", SOFTMAX, joint=Joint("one", 0, 1)).leave()


def expected_losses_and_weights() -> tuple[list[list[float]], torch.Tensor]:
    """Those of one process that has the images of all ranks that have some."""
    net = model()
    optimizer, local = torch.optim.SGD(net.parameters(), lr=0.1), LocalLoss(LOSS)
    losses: list[list[float]] = [[] for _ in range(WORLD)]
    for epoch, images_of in enumerate(IMAGES):
        for number in range(max(map(len, images_of))):
            ranks = [rank for rank in range(WORLD) if number < len(images_of[rank])]
            parts = [batch(epoch, rank, number) for rank in ranks]
            optimizer.zero_grad()
            loss = local(net(torch.cat([p[0] for p in parts])), torch.cat([p[1] for p in parts]))
            loss.backward()
            optimizer.step()
            for rank in ranks:
                losses[rank].append(loss.item())
    return losses, torch.nn.utils.parameters_to_vector(net.parameters()).detach()


@pytest.mark.parametrize("reduction", ["mean", "active_mean"])
def test_a_distributed_training_with_uneven_data_trains_as_one_process(
    server: ServerProcess, tmp_path: Path, reduction: str
) -> None:
    command = [sys.executable, uneven_ranks.__file__, server.target, "--store", str(tmp_path / "store")]
    processes = [
        Forked(
            [*command, "--reduction", reduction, "--rank", str(rank)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for rank in range(WORLD)
    ]
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    losses, weights = expected_losses_and_weights()
    for rank, (output, complaint) in enumerate(said):
        assert processes[rank].returncode == 0, complaint.decode()
        answer = json.loads(output)
        assert answer["losses"] == pytest.approx(losses[rank], rel=1e-5)
        torch.testing.assert_close(torch.tensor(answer["weights"]), weights, rtol=1e-4, atol=1e-5)


# --- Ranks that make other calls ----------------------------------------------------------------------------------


def test_a_rank_that_left_out_a_step_is_found_out_when_all_wait(server: ServerProcess) -> None:
    """The number of the batch is given: rank 1 has none at step 1."""

    def work(rank: int) -> str:
        criterion = RemoteLoss(server.target, SOFTMAX, joint=Joint("left out", rank, 2), timeout=120)
        try:
            for step in (0, 1, 2) if rank == 0 else (0, 2):
                criterion(GOOD[0].clone().requires_grad_(), GOOD[1], step=step)
        except CallAbortedError as error:
            return str(error)
        finally:
            criterion.close()
        return ""

    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(work, range(2)))
    for text in texts:
        assert "run 'left out' wait for each other at different steps: rank 0 at step 1, rank 1 at step 2;" in text


def test_an_evaluation_on_one_rank_while_the_others_train_is_found_out(server: ServerProcess) -> None:
    def work(rank: int) -> str:
        criterion = RemoteLoss(server.target, SOFTMAX, joint=Joint("only rank 0", rank, 2), timeout=120)
        logits = GOOD[0].clone().requires_grad_()
        try:
            criterion(logits, GOOD[1])
            if rank == 0:
                with torch.no_grad():
                    criterion(logits, GOOD[1])
            criterion(logits, GOOD[1])
        except CallAbortedError as error:
            return str(error)
        finally:
            criterion.close()
        return ""

    with ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(work, range(2)))
    for text in texts:
        assert "rank 0 at evaluation step 0, rank 1 at step 1; all ranks must make the same calls: one has left" in text
        assert ", or not all of them evaluate; rank 1 made no evaluation step" in text
        assert "evaluate on all ranks, or with a RemoteLoss without joint" in text


def test_calls_that_overlap_are_no_sign_of_it(server: ServerProcess) -> None:
    """Each rank trains in one thread and evaluates in another; their calls come in any order."""
    with LossClient(server.target) as client, ThreadPoolExecutor(4) as pool:

        def ask(rank: int, want_grad: bool) -> Future[Result[Any]]:
            place = Joint("overlap", rank, 2, step=0)
            return pool.submit(client.compute, *tensors(0, rank), SOFTMAX, want_grad=want_grad, joint=place)

        first = [ask(0, True), ask(1, False)]
        assert eventually(lambda: waiting_ranks(server) == 2)
        first += [ask(0, False), ask(1, True)]
        assert len({call.result().loss for call in first}) == 1
