"""Several servers behind one target: the ranks of a joint step reach one of them, and what happens when they do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from support import ranks_of_several_servers
from support.fork_server import Forked, ForkedServer
from support.ranks_of_several_servers import LOSS, LOST_STEP, WORLD, batch, model
from support.scrape import metric
from support.waiting import eventually

from lovasz.client import CallAbortedError, Joint, LossClient, LovaszSoftmax
from lovasz.core import LocalLoss
from lovasz.server.launch import ServerProcess
from lovasz.version import VERSION

VARIABLE = "GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY"
SCRIPT = Path(ranks_of_several_servers.__file__)
JOINT_TIMEOUT = 3
STEPS = 80
hashing = pytest.mark.skipif(
    tuple(map(int, grpc.__version__.split(".")[:2])) < (1, 70), reason="hashing by a header came with grpcio 1.70"
)


@contextmanager
def three_servers() -> Iterator[list[ServerProcess]]:
    arguments = ["--device", "cpu", "--joint-timeout", str(JOINT_TIMEOUT)]
    with ExitStack() as stack:  # One after the other: the first compiles for all.
        yield [stack.enter_context(ForkedServer(arguments)) for _ in range(3)]


@pytest.fixture(scope="module")
def servers() -> Iterator[list[ServerProcess]]:
    with three_servers() as servers:
        yield servers


@dataclass
class Ranks:
    """A process of ``ranks_of_several_servers.py``, and what it writes."""

    process: subprocess.Popen[bytes]
    output: Path

    @property
    def complaint(self) -> str:
        return self.output.with_suffix(".stderr").read_text()

    def answer(self, seconds: float) -> dict[str, Any]:
        """What it found, when it has ended well."""
        assert self.process.wait(seconds) == 0, self.complaint
        answer: dict[str, Any] = json.loads(self.output.read_text())
        return answer


@contextmanager
def ranks(role: str, servers: list[ServerProcess], count: int, output: Path, *more: str) -> Iterator[Ranks]:
    command = [sys.executable, str(SCRIPT), role, ",".join(server.target for server in servers), "--count", str(count)]
    environment = {**os.environ, VARIABLE: "true"}
    with output.open("w") as stdout, output.with_suffix(".stderr").open("w") as stderr:
        process = Forked([*command, *more], env=environment, stdout=stdout, stderr=stderr)
    try:
        yield Ranks(process, output)
    finally:
        process.kill()
        process.wait()


def completed(server: ServerProcess) -> float:
    return metric(server, "lovasz_joint_groups_total", outcome="completed")


class Counts:
    """What each server does from now on."""

    def __init__(self, servers: list[ServerProcess]) -> None:
        self._servers = servers
        self._before = self._now()

    def since(self) -> tuple[list[float], list[float]]:
        """Joint steps, and losses of any kind."""
        pairs = list(zip(self._now(), self._before, strict=True))
        return [now[0] - before[0] for now, before in pairs], [now[1] - before[1] for now, before in pairs]

    def _now(self) -> list[tuple[float, float]]:
        return [(completed(server), metric(server, "lovasz_requests_total")) for server in self._servers]


@hashing
def test_with_ring_hash_the_ranks_of_a_run_meet_and_runs_are_spread(
    servers: list[ServerProcess], tmp_path: Path
) -> None:
    runs = 24
    of_all = Counts(servers)
    with ranks("groups", servers, runs, tmp_path / "groups") as process:
        answer = process.answer(seconds=90)
    assert answer["version"] == VERSION
    assert len(answer["losses"]) == 2 * runs
    assert all(len(set(of_ranks)) == 1 for of_ranks in answer["losses"]), "ranks of one step differ"
    assert len({of_ranks[0] for of_ranks in answer["losses"]}) == 2, "runs differ in the same step"
    groups, calls = of_all.since()
    assert sum(groups) == 2 * runs
    assert all(count % 2 == 0 for count in groups), "both steps of a run, the message and the stream, go together"
    assert sum(count > 0 for count in groups) >= 2, groups
    alone = [of_server - WORLD * of_groups for of_server, of_groups in zip(calls, groups, strict=True)]
    assert sum(alone) == 60
    assert all(count >= 5 for count in alone), f"requests of nobody's run are not spread: {alone}"


def test_round_robin_takes_each_server_in_turn(servers: list[ServerProcess]) -> None:
    target = "ipv4:" + ",".join(server.target for server in servers)
    logits, labels = np.zeros((1, 2, 4, 4), np.float32), np.zeros((1, 4, 4), np.uint8)
    of_all = Counts(servers)
    with LossClient(target, load_balancing="round_robin") as client:
        for _ in range(60):
            client.compute(logits, labels, LovaszSoftmax())
    _, calls = of_all.since()
    assert sum(calls) == 60
    assert all(count >= 10 for count in calls), calls


def test_ranks_on_two_servers_are_told_who_is_missing_and_why_that_can_be(servers: list[ServerProcess]) -> None:
    logits, labels = np.zeros((1, 2, 4, 4), np.float32), np.zeros((1, 4, 4), np.uint8)
    with ExitStack() as stack, ThreadPoolExecutor(3) as threads:
        clients = [stack.enter_context(LossClient(servers[number].target)) for number in (0, 0, 1)]
        calls = [
            threads.submit(client.compute, logits, labels, LovaszSoftmax(), joint=Joint("split", rank, 3, 0))
            for rank, client in enumerate(clients)
        ]
        for call, missing in zip(calls, ("rank 2", "rank 2", "ranks 0, 1"), strict=True):
            with pytest.raises(CallAbortedError) as raised:
                call.result(timeout=30)
            text = str(raised.value)
            assert f"{missing} of 3 did not arrive at step 0 of run 'split' within {JOINT_TIMEOUT} s" in text
            assert "reached another server (see load_balancing)" in text


def expected_losses(steps: int) -> list[float]:
    """Those of one process with the images of all ranks."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    criterion = LocalLoss(LOSS)
    losses = []
    for step in range(steps):
        of_ranks = [batch(step, rank) for rank in range(WORLD)]
        images, labels = (torch.cat(tensors) for tensors in zip(*of_ranks, strict=True))
        loss = criterion(net(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@hashing
@pytest.mark.timeout(240)
def test_a_training_outlives_the_server_that_it_was_on(tmp_path: Path) -> None:
    """One is killed in mid-training, and at another step one rank of three loses its answer."""
    store = str(tmp_path / "store")
    with three_servers() as servers, ExitStack() as stack:
        of_ranks = [
            stack.enter_context(
                ranks("train", servers, STEPS, tmp_path / str(rank), "--rank", str(rank), "--store", store)
            )
            for rank in range(WORLD)
        ]
        assert eventually(lambda: sum(map(completed, servers)) > LOST_STEP + 5), [one.complaint for one in of_ranks]
        (home,) = [server for server in servers if completed(server)]
        home.kill()
        answers = [one.answer(seconds=60) for one in of_ranks]
        assert sum(completed(server) > 0 for server in servers if server is not home) == 1, "they go on together"
    expected = expected_losses(STEPS)
    for answer in answers:
        assert answer["losses"] == answers[0]["losses"]
        np.testing.assert_allclose(answer["losses"], expected, rtol=1e-4)
    assert any("as if the answer had been lost" in error for error in answers[1]["errors"])
