"""Joint steps through a real server and real clients: answers, what trainers make of them, ranks that are killed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from support import many_ranks
from support.footprint import Footprint
from support.fork_server import Forked, ForkedServer
from support.many_ranks import WORLD
from support.messages import request_of
from support.scrape import metric
from support.waiting import eventually

from lovasz import wire
from lovasz.client import (
    CallAbortedError,
    CrossEntropy,
    Joint,
    JointMismatchError,
    LossClient,
    LovaszHinge,
    LovaszSoftmax,
    Result,
    ServerOverloadedError,
)
from lovasz.client import remote as client_remote
from lovasz.client.torch import RemoteLoss
from lovasz.core import LocalLoss, compute
from lovasz.server.launch import ServerProcess
from lovasz.spec import LossLike, weighted_sum
from lovasz.v1 import loss_pb2_grpc

SOFTMAX = LovaszSoftmax()
VOID = 255
Tensors = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server, on TCP and on a socket with shared memory; it waits long for ranks."""
    path = tmp_path_factory.mktemp("joint") / "s"
    arguments = ["--device", "cpu", "--listen", f"127.0.0.1:0,unix:{path}", "--shared-memory"]
    with ForkedServer(arguments) as server:
        yield server


@pytest.fixture(params=["unary", "stream", "shm"])
def target(request: pytest.FixtureRequest, servers: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where clients find it, by each way that tensors travel."""
    monkeypatch.setattr(client_remote, "UNARY_BYTES", 4 << 20 if request.param == "unary" else 0)
    monkeypatch.setattr(client_remote, "SHARED_BYTES", 0)
    return servers.targets[request.param == "shm"]


def a_part(rank: int, channels: int, spatial: tuple[int, ...], *, hinge: bool, void: float = 0.0) -> Tensors:
    generator = torch.Generator().manual_seed(rank)
    images = 1 + rank % 2
    logits = torch.randn(images, channels, *spatial, generator=generator) * 2
    labels = torch.randint(0, 2 if hinge else channels, (images, *spatial), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < void] = VOID
    return logits, labels


def together(
    target: str, parts: Sequence[Tensors], loss: LossLike, *, order: Sequence[int] | None = None, **options: Any
) -> list[Result[Any]]:
    """The answers to all ranks, which come in some order."""
    run = str(random.random())
    with LossClient(target, **options) as client, ThreadPoolExecutor(len(parts)) as pool:
        calls: dict[int, Future[Result[Any]]] = {}
        for rank in order or range(len(parts)):
            place = Joint(run, rank, len(parts), step=0)
            calls[rank] = pool.submit(client.compute, *parts[rank], loss, joint=place)
        return [calls[rank].result() for rank in range(len(parts))]


def assert_one(answers: Sequence[Result[Any]], whole: Result[Any], grads: Sequence[torch.Tensor]) -> None:
    for answer, grad in zip(answers, grads, strict=True):
        assert answer.loss == whole.loss
        for mine, one in zip(answer.terms, whole.terms, strict=True):
            assert mine.loss == one.loss
            assert np.array_equal(mine.per_class_loss, one.per_class_loss, equal_nan=True)
        assert np.array_equal(answer.intersection, whole.intersection)
        assert np.array_equal(answer.union, whole.union)
        assert answer.grad.dtype == grad.dtype
        assert torch.equal(answer.grad, grad)


# --- Answers ------------------------------------------------------------------------------------------------------

LOSSES: dict[str, tuple[LossLike, int]] = {
    "softmax": (LovaszSoftmax(ignore_index=VOID), 5),
    "per image": (LovaszSoftmax(per_image=True, classes="all", ignore_index=VOID), 5),
    "weighted terms": (
        [
            (0.5, CrossEntropy(class_weights=(1, 2, 0, 3, 0.5), ignore_index=VOID, label_smoothing=0.1)),
            (2.0, LovaszSoftmax(class_weights=(1, 2, 0, 3, 0.5), ignore_index=VOID)),
        ],
        5,
    ),
    "hinge": (LovaszHinge(ignore_index=VOID), 1),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ranks_get_to_the_bit_what_one_request_of_all_their_images_would_get(
    target: str, servers: ServerProcess, name: str, dtype: torch.dtype
) -> None:
    """Of one rank, all pixels are void."""
    loss, channels = LOSSES[name]
    voids = (0.2, 1.0, 0.0, 0.5)
    parts = [
        a_part(rank, channels, (20, 30), hinge=weighted_sum(loss).is_binary, void=void)
        for rank, void in enumerate(voids)
    ]
    parts = [(logits.to(dtype), labels) for logits, labels in parts]
    order = random.Random(name).sample(range(4), 4)
    answers = together(target, parts, loss, order=order)
    with LossClient(servers.target) as client:
        whole = client.compute(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), loss)
    assert_one(answers, whole, whole.grad.split([len(p[0]) for p in parts]))
    assert not answers[1].grad.any()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_the_order_of_arrival_changes_no_bit(servers: ServerProcess, order: tuple[int, ...]) -> None:
    parts = [a_part(rank, 5, (9, 7), hinge=False) for rank in range(3)]
    with LossClient(servers.target) as client, ThreadPoolExecutor(3) as pool:
        calls = {}
        for place, rank in enumerate(order):
            joint = Joint(f"order {order}", rank, 3, step=0)
            calls[rank] = pool.submit(client.compute, *parts[rank], SOFTMAX, joint=joint)
            assert place == 2 or eventually(
                lambda place=place: metric(servers, "lovasz_joint_ranks_waiting") == place + 1
            )
        answers = [calls[rank].result() for rank in range(3)]
        whole = client.compute(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), SOFTMAX)
    assert_one(answers, whole, whole.grad.split([len(p[0]) for p in parts]))
    assert all(answer.timing is not None and answer.timing.joint_wait_seconds >= 0 for answer in answers)


def test_ranks_with_images_of_other_sizes_get_what_their_pixels_in_a_row_would_get(
    target: str, servers: ServerProcess
) -> None:
    loss = [(1.0, LovaszSoftmax(ignore_index=VOID)), (1.0, CrossEntropy(ignore_index=VOID))]
    spatials = ((70, 50), (8,), (17, 3, 2), (1,))
    parts = [a_part(rank, 5, spatial, hinge=False, void=0.1) for rank, spatial in enumerate(spatials)]

    def pixels(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flatten(2).movedim(1, 2).reshape(-1, 5)

    answers = together(target, parts, loss)
    with LossClient(servers.target) as client:
        whole = client.compute(
            torch.cat([pixels(logits) for logits, _ in parts]),
            torch.cat([labels.flatten() for _, labels in parts]),
            loss,
        )
    for answer, grad in zip(answers, whole.grad.split([p[1].numel() for p in parts]), strict=True):
        assert answer.loss == whole.loss
        assert torch.equal(pixels(answer.grad), grad)


def test_an_evaluation_gets_loss_and_counts_of_all(target: str, servers: ServerProcess) -> None:
    parts = [a_part(rank, 5, (20, 30), hinge=False) for rank in range(3)]
    with LossClient(target) as client, ThreadPoolExecutor(3) as pool:
        calls = [
            pool.submit(client.compute, *part, SOFTMAX, want_grad=False, joint=Joint(target, rank, 3, step=0))
            for rank, part in enumerate(parts)
        ]
        answers = [call.result() for call in calls]
        whole = client.compute(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), SOFTMAX)
    for answer in answers:
        assert answer.grad is None
        assert answer.loss == whole.loss
        assert np.array_equal(answer.class_iou, whole.class_iou)


# --- Trainers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_trainer_that_counts_its_calls_gets_the_gradient_of_the_global_batch(
    servers: ServerProcess, reduction: str
) -> None:
    """Two passes forward for each backward one, and evaluations, counted apart, after the first and the last."""
    world, steps, passes = 3, 3, 2
    local = LocalLoss(SOFTMAX)

    def part_of(step: int, rank: int) -> Tensors:
        return a_part(10 * step + rank, 4, (6, 5), hinge=False)

    def train(rank: int) -> tuple[list[torch.Tensor], list[float], list[float]]:
        joint = Joint(f"trainer {reduction}", rank, world)
        criterion = RemoteLoss(servers.target, SOFTMAX, joint=joint, gradient_reduction=reduction)
        grads, losses, evaluated = [], [], []
        for step in range(steps):
            batches = [part_of(passes * step + one, rank) for one in range(passes)]
            inputs = [logits.clone().requires_grad_() for logits, _ in batches]
            if step != 1:
                with torch.no_grad():
                    evaluated.append(criterion(inputs[0], batches[0][1]).item())
            total = sum(criterion(logits, labels) for logits, (_, labels) in zip(inputs, batches, strict=True))
            assert isinstance(total, torch.Tensor)
            total.backward()
            losses.append(total.item())
            grads += [logits.grad for logits in inputs if logits.grad is not None]
        criterion.close()
        return grads, losses, evaluated

    with ThreadPoolExecutor(world) as pool:
        trained = list(pool.map(train, range(world)))
    for number in range(steps * passes):
        parts = [part_of(number, rank) for rank in range(world)]
        logits = torch.cat([part[0] for part in parts]).requires_grad_()
        local(logits, torch.cat([part[1] for part in parts])).backward()
        assert logits.grad is not None
        expected = logits.grad.split([len(part[0]) for part in parts])
        for rank in range(world):
            assert torch.equal(trained[rank][0][number], expected[rank] * (world if reduction == "mean" else 1))
    assert len({tuple(losses) for _, losses, _ in trained}) == 1
    for place, step in enumerate((0, 2)):
        parts = [part_of(passes * step, rank) for rank in range(world)]
        whole = compute(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), SOFTMAX)
        assert {evaluated[place] for _, _, evaluated in trained} == {float(np.float32(whole.loss))}


def test_a_trainer_that_counts_by_itself_says_which_step_it_is(servers: ServerProcess) -> None:
    parts = [a_part(rank, 4, (6,), hinge=False) for rank in range(2)]

    def train(rank: int, steps: Sequence[int]) -> list[float]:
        criterion = RemoteLoss(servers.target, SOFTMAX, joint=Joint("counted", rank, 2, step=40), timeout=30)
        losses = [criterion(parts[rank][0].clone().requires_grad_(), parts[rank][1], step=s).item() for s in steps]
        losses.append(criterion(parts[rank][0].clone().requires_grad_(), parts[rank][1]).item())
        criterion.close()
        return losses

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(train, range(2), [(7, 3, 9), (7, 3, 9)])
    assert first == second
    assert len(first) == 4


# --- Calls that come again ----------------------------------------------------------------------------------------


def test_a_request_that_is_sent_again_gets_the_same_bytes(servers: ServerProcess) -> None:
    """As where the answer was lost on its way."""
    requests = [
        request_of(*many_ranks.tensors(0, rank), joint=wire.Joint("again", 0, rank, 2, bytes([rank] * 16)))
        for rank in range(2)
    ]
    with grpc.insecure_channel(servers.target) as channel:
        stub = loss_pb2_grpc.LossServiceStub(channel)
        calls = [stub.Compute.future(request) for request in requests]
        answers = [call.result() for call in calls]
        for request, answer in zip(requests, answers, strict=True):
            again = stub.Compute(request)
            assert again.grad == answer.grad
            again.header.timing.Clear()
            answer.header.timing.Clear()
            assert again.header == answer.header
    assert metric(servers, "lovasz_joint_groups_waiting") == 0


def test_a_rank_that_goes_away_while_it_waits_can_be_started_again(servers: ServerProcess) -> None:
    parts = [many_ranks.tensors(0, rank) for rank in range(3)]
    with LossClient(servers.target) as client, grpc.insecure_channel(servers.target) as channel:
        message = request_of(*parts[0], joint=wire.Joint("restarted rank", 0, 0, 3, b"1"))
        gone = loss_pb2_grpc.LossServiceStub(channel).Compute.future(message)
        others = [client.submit(*parts[rank], SOFTMAX, joint=Joint("restarted rank", rank, 3, step=0)) for rank in (1,)]
        assert eventually(lambda: metric(servers, "lovasz_joint_ranks_waiting") == 2)
        gone.cancel()
        assert eventually(lambda: metric(servers, "lovasz_joint_ranks_waiting") == 1)
        others.append(client.submit(*parts[2], SOFTMAX, joint=Joint("restarted rank", 2, 3, step=0)))
        first = client.compute(*parts[0], SOFTMAX, joint=Joint("restarted rank", 0, 3, step=0))
        assert [other.result().loss for other in others] == [first.loss] * 2


# --- Ranks that are missing, differ, or are too many --------------------------------------------------------------


@pytest.fixture(scope="module")
def impatient() -> Iterator[ServerProcess]:
    """A server that waits for missing ranks for a second."""
    with ForkedServer(["--device", "cpu", "--joint-timeout", "1", "--max-requests", "8"]) as server:
        yield server


def test_a_missing_rank_is_named_and_the_step_can_be_tried_again(impatient: ServerProcess) -> None:
    parts = [many_ranks.tensors(0, rank) for rank in range(3)]
    with LossClient(impatient.target) as client, ThreadPoolExecutor(3) as pool:

        def ask(rank: int) -> Future[Result[Any]]:
            return pool.submit(client.compute, *parts[rank], SOFTMAX, joint=Joint("missing", rank, 3, step=4))

        for call in [ask(0), ask(2)]:
            with pytest.raises(
                CallAbortedError, match=r"rank 1 of 3 did not arrive at step 4 of run 'missing' within 1 s"
            ):
                call.result()
        assert len({call.result().loss for call in [ask(0), ask(1), ask(2)]}) == 1


def test_a_rank_that_differs_is_told_how(servers: ServerProcess) -> None:
    parts = [many_ranks.tensors(0, rank) for rank in range(2)]
    with LossClient(servers.target) as client:
        first = client.submit(*parts[0], SOFTMAX, joint=Joint("differs", 0, 2, step=0))
        assert eventually(lambda: metric(servers, "lovasz_joint_ranks_waiting") == 1)
        with pytest.raises(JointMismatchError, match=r": loss is .*; the waiting ranks have "):
            client.compute(*parts[1], CrossEntropy(), joint=Joint("differs", 1, 2, step=0))
        client.compute(*parts[1], SOFTMAX, joint=Joint("differs", 1, 2, step=0))
        assert first.result().loss > 0


def test_a_run_that_starts_again_from_step_0_passes_its_old_groups_by(servers: ServerProcess) -> None:
    parts = [many_ranks.tensors(0, rank) for rank in range(3)]
    with LossClient(servers.target, timeout=100) as old, LossClient(servers.target) as new:
        waiting = [old.submit(*parts[rank], SOFTMAX, joint=Joint("restarted", rank, 3, step=9)) for rank in range(2)]
        assert eventually(lambda: metric(servers, "lovasz_joint_ranks_waiting") == 2)
        for step in range(10):
            calls = [new.submit(*parts[rank], SOFTMAX, joint=Joint("restarted", rank, 3, step=step)) for rank in (2,)]
            if step < 9:
                calls += [new.submit(*parts[r], SOFTMAX, joint=Joint("restarted", r, 3, step=step)) for r in range(2)]
            else:
                calls += waiting
            assert len({call.result().loss for call in calls}) == 1
    assert metric(servers, "lovasz_joint_groups_waiting") == 0


def test_ranks_that_wait_do_not_take_the_threads_that_the_last_ones_need(impatient: ServerProcess) -> None:
    """As many wait as are held at most, and many more ask."""
    parts = [many_ranks.tensors(0, rank) for rank in range(2)]
    with ExitStack() as stack:
        channels = [stack.enter_context(grpc.insecure_channel(impatient.target)) for _ in range(2)]
        stubs = [loss_pb2_grpc.LossServiceStub(channel) for channel in channels]

        def ask(run: int, rank: int, stub: int = 0) -> grpc.Future:
            joint = wire.Joint(f"threads {run}", 0, rank, 2, bytes([run, rank]))
            return stubs[stub].Compute.future(request_of(*parts[rank], joint=joint), timeout=60)

        for _ in range(3):
            waiting = [ask(run, 0) for run in range(4)]
            refused = [ask(100 + run, 0, 1) for run in range(60)]
            last = [ask(run, 1) for run in range(4)]
            codes = {call.code() for call in refused}
            assert codes <= {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.ABORTED}
            for call in (*waiting, *last):
                assert call.code() in (
                    grpc.StatusCode.OK,
                    grpc.StatusCode.ABORTED,
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                ), call.details()
    assert eventually(lambda: metric(impatient, "lovasz_in_flight_requests") == 0)


def test_where_there_is_room_for_some_runs_only_each_call_ends_and_the_runs_get_through_one_after_the_other() -> None:
    logits, labels = torch.randn(1, 4, 64, 64), torch.randint(0, 4, (1, 64, 64), dtype=torch.uint8)
    nbytes = 2 * logits.nbytes + labels.nbytes
    arguments = ["--device", "cpu", "--memory-budget", f"{9 * nbytes}B", "--joint-timeout", "5"]
    runs, world, steps = 4, 4, 2
    with ForkedServer(arguments) as server, LossClient(server.target) as client:
        alone = client.compute(torch.cat([logits] * world), torch.cat([labels] * world), SOFTMAX).loss

        def work(run: int, rank: int) -> list[str]:
            said = []
            for step in range(steps):
                try:
                    result = client.compute(logits, labels, SOFTMAX, joint=Joint(f"run {run}", rank, world, step=step))
                    assert result.loss == alone
                    said.append("answered")
                except (ServerOverloadedError, CallAbortedError) as error:
                    said.append(type(error).__name__)
            return said

        with ThreadPoolExecutor(runs * world) as pool:
            calls = [pool.submit(work, run, rank) for run in range(runs) for rank in range(world)]
            said = [word for call in calls for word in call.result()]
        assert said.count("answered") >= runs * world * steps // 2
        assert eventually(lambda: metric(server, "lovasz_joint_groups_waiting") == 0)
        assert metric(server, "lovasz_in_flight_requests") == 0
        assert metric(server, "lovasz_requests_total", code="INTERNAL") == 0


# --- Draining -----------------------------------------------------------------------------------------------------


def test_sigterm_lets_the_last_ranks_come_and_ends_with_all_answered() -> None:
    parts = [many_ranks.tensors(0, rank) for rank in range(2)]
    with ForkedServer(["--device", "cpu"]) as server, grpc.insecure_channel(server.target) as channel:
        stub = loss_pb2_grpc.LossServiceStub(channel)
        first = stub.Compute.future(request_of(*parts[0], joint=wire.Joint("drain", 0, 0, 2, b"1")), timeout=60)
        assert eventually(lambda: metric(server, "lovasz_joint_ranks_waiting") == 1)
        with ThreadPoolExecutor(1) as pool:
            status = pool.submit(server.stop)
            unavailable = grpc.StatusCode.UNAVAILABLE
            assert eventually(lambda: stub.Compute.future(request_of(*parts[0])).code() is unavailable)
            new = stub.Compute.future(request_of(*parts[0], joint=wire.Joint("drain", 1, 0, 2, b"2")), timeout=60)
            assert new.code() is unavailable
            second = stub.Compute.future(request_of(*parts[1], joint=wire.Joint("drain", 0, 1, 2, b"3")), timeout=60)
            assert first.result().header.loss == second.result().header.loss
            assert status.result() == 0


def test_ranks_that_still_wait_when_draining_ends_are_told_whom_they_waited_for() -> None:
    parts = [many_ranks.tensors(0, rank) for rank in range(2)]
    arguments = ["--device", "cpu", "--drain-seconds", "0.5"]
    with ForkedServer(arguments) as server, grpc.insecure_channel(server.target) as channel:
        stub = loss_pb2_grpc.LossServiceStub(channel)
        calls = [
            stub.Compute.future(
                request_of(*parts[rank], joint=wire.Joint("drain", 0, rank, 3, bytes([rank]))), timeout=60
            )
            for rank in range(2)
        ]
        assert eventually(lambda: metric(server, "lovasz_joint_ranks_waiting") == 2)
        assert server.stop() == 1
        for call in calls:
            assert call.code() is grpc.StatusCode.UNAVAILABLE
            assert call.details() == "the server is stopping, and rank 2 of 3 did not arrive at step 0 of run 'drain'"


# --- Many ---------------------------------------------------------------------------------------------------------

RUNS = 20
PROCESSES = 9
VICTIMS = 3
SAFE, DOOMED = range(15, 20), range(5)
"""Runs of which no rank is killed, and of which some rank is killed before it calls."""


def expected_of(run: int) -> tuple[float, list[bytes]]:
    parts = [many_ranks.tensors(run, rank) for rank in range(WORLD)]
    logits, labels = (torch.from_numpy(np.concatenate(tensors)) for tensors in zip(*parts, strict=True))
    whole = compute(logits, labels, SOFTMAX)
    assert whole.grad is not None
    return whole.loss, [grad.numpy().tobytes() for grad in whole.grad]


def many_at_once(target: str, round_number: int, rng: random.Random) -> tuple[list[list[str]], set[tuple[int, int]]]:
    """What each call of the processes that survive ended with, and which ranks were killed."""
    places: dict[int, list[tuple[int, int, float]]] = {number: [] for number in range(PROCESSES)}
    for run in range(RUNS):
        for rank in range(WORLD):
            # Victims have no rank of the safe runs, and so more of the others.
            number = rng.randrange(VICTIMS if run in SAFE else 0, PROCESSES)
            if run not in SAFE and rng.random() < 0.15:
                number = rng.randrange(VICTIMS)
            never = run in DOOMED and number < VICTIMS
            places[number].append((run, rank, -1.0 if never else rng.uniform(0, 2)))
    processes = [
        Forked(
            [sys.executable, "-m", "support.many_ranks", target, str(round_number)],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(PROCESSES)
    ]
    for number, process in enumerate(processes):
        assert process.stdin is not None
        with process.stdin:
            process.stdin.writelines(f"{run} {rank} {seconds}\n" for run, rank, seconds in places[number])
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
    killers = [
        threading.Timer(rng.uniform(0, 2), process.send_signal, [signal.SIGKILL]) for process in processes[:VICTIMS]
    ]
    for killer in killers:
        killer.start()
    said = []
    for number, process in enumerate(processes):
        assert process.stdout is not None
        with process.stdout:
            lines = [line.rstrip("\n").split(" ", 5) for line in process.stdout]
        assert process.wait() == (-signal.SIGKILL if number < VICTIMS else 0)
        if number >= VICTIMS:
            assert len(lines) == len(places[number])
            said += lines
    for killer in killers:
        killer.join()
    return said, {(run, rank) for number in range(VICTIMS) for run, rank, _ in places[number]}


def test_of_many_runs_with_many_ranks_a_third_is_killed_and_each_survivor_learns_what_became_of_its_step() -> None:
    expected, rng = [expected_of(run) for run in range(RUNS)], random.Random(7)
    # One process of callers may be ahead of all others; and a slow machine takes seconds for as many calls.
    arguments = ["--device", "cpu", "--joint-timeout", "15", "--max-requests", "2000", "--joint-share", "0.99"]
    with ServerProcess(arguments) as server:

        def all_ended() -> bool:
            names = ("in_flight_requests", "joint_groups_waiting", "joint_ranks_waiting", "queue_requests")
            return all(metric(server, f"lovasz_{name}") == 0 for name in names)

        footprints = []
        for round_number in range(2):
            said, killed = many_at_once(server.target, round_number, rng)
            assert RUNS * WORLD / 4 < len(killed) < RUNS * WORLD / 2
            assert len(said) == RUNS * WORLD - len(killed)
            for run_text, rank_text, code, loss, grad, text in said:
                run, rank = int(run_text), int(rank_text)
                if code == "OK":
                    assert run not in DOOMED
                    assert float(loss) == expected[run][0]
                    assert bytes.fromhex(grad) == expected[run][1][rank]
                    continue
                assert run not in SAFE, text
                assert code == "ABORTED", text
                assert f" of {WORLD} did not arrive at step 0 of run '{round_number}-{run}' within 15 s" in text
                missing = text.removeprefix("ranks ").removeprefix("rank ").partition(" of ")[0]
                named = {int(number) for number in missing.partition(" and ")[0].split(", ")}
                assert named <= {other for other_run, other in killed if other_run == run}
            assert eventually(all_ended)
            footprints.append(Footprint.of(server.pid))
        first, second = footprints
        assert second.threads <= first.threads, "threads are used again"
        assert second.resident_bytes <= first.resident_bytes + (64 << 20)
        assert eventually(lambda: metric(server, "lovasz_in_flight_bytes") == 0)
        assert metric(server, "lovasz_joint_answers_kept") == 0
        assert metric(server, "lovasz_requests_total", code="INTERNAL") == 0
        assert not [line for line in server.log if line.get("level") == "error"]
