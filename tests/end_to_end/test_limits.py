"""Limits by name, and names of runs that are shortened, on a real server."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.fork_server import ForkedServer
from support.messages import LOSS, tensors
from support.scrape import metric
from support.waiting import eventually

from lovasz.client import Joint, LossClient, ServerOverloadedError
from lovasz.server.launch import ServerProcess

TOKENS = {name: name + "-" + name[0] * 20 for name in ("alice", "bob", "carol")}
LIMITS = {"alice": "budget=0.016", "bob": "weight=8", "carol": ""}
IN_FLIGHT = 8
IMAGE = np.zeros((1, 3, 128, 128), np.float32), np.zeros((1, 128, 128), np.uint8)
"""400 KiB with its gradient; alice may hold 1 MiB, and have 4 requests."""


class Limited:
    """A server with a tokens file."""

    def __init__(self, server: ServerProcess, file: Path) -> None:
        self.server, self._file = server, file

    def connect(self, name: str, timeout: float = 60, run: str | None = None) -> LossClient:
        return LossClient(self.server.target, timeout=timeout, token=TOKENS[name], run=run)

    def rewrite(self, event: str, **limits: str) -> None:
        """Writes the file, and waits until the server has logged it."""
        before = self.logged(event)
        self._file.write_text(lines({**LIMITS, **limits}))
        assert eventually(lambda: self.logged(event) > before)

    def logged(self, event: str) -> int:
        return sum(line["event"] == event for line in self.server.log)

    def page(self, path: str, **headers: str) -> str:
        request = urllib.request.Request(self.server.metrics_url.replace("/metrics", path), headers=headers)
        with urllib.request.urlopen(request, timeout=30) as page:
            return str(page.read().decode())


def lines(limits: dict[str, str]) -> str:
    return "".join(f"{name}:{TOKENS[name]} {words}\n" for name, words in limits.items())


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Limited]:
    file = tmp_path_factory.mktemp("limits") / "tokens"
    file.write_text(lines(LIMITS))
    with ForkedServer(["--device", "cpu", "--memory-budget", "62.5MiB", "--tokens", str(file)]) as server:
        yield Limited(server, file)


def test_a_name_that_holds_its_share_waits_and_others_do_not(limited: Limited) -> None:
    with limited.connect("alice") as alice, limited.connect("bob") as bob, ThreadPoolExecutor(2) as threads:
        alice.compute(*IMAGE, LOSS)  # Once it has had an answer, a client retries until its timeout.
        place = [Joint("limits", rank=rank, world_size=2, step=0) for rank in range(2)]
        first = threads.submit(alice.compute, *IMAGE, LOSS, joint=place[0])
        assert eventually(lambda: metric(limited.server, "lovasz_joint_ranks_waiting") == 1)
        waiting = threads.submit(alice.compute, *IMAGE, LOSS)
        assert eventually(lambda: metric(limited.server, "lovasz_rejections_total", reason="name_limit") > 0)
        with (
            limited.connect("alice", timeout=1) as impatient,
            pytest.raises(
                ServerOverloadedError, match=r"the requests of alice hold 800 KiB of at most 1 MiB \(budget=0.016 of"
            ),
        ):
            impatient.compute(*IMAGE, LOSS)
        assert bob.compute(*IMAGE, LOSS).loss > 0
        assert not waiting.done()
        alice.compute(*IMAGE, LOSS, joint=place[1])
        assert first.result(60).loss > 0
        assert waiting.result(60).loss > 0


def test_what_never_fits_is_refused_at_once_until_the_file_allows_it(limited: Limited) -> None:
    three = tuple(np.repeat(array, 3, axis=0) for array in IMAGE)
    with limited.connect("alice") as alice:
        for wrong in (False, True):
            if wrong:
                limited.rewrite("files changed and cannot be used: the old contents stay in use", alice="budget=2")
            with pytest.raises(ServerOverloadedError, match=r"the requests of alice may hold 1 MiB at a time"):
                alice.compute(*three, LOSS)
        limited.rewrite("files were read again", alice="budget=0.5")
        assert alice.compute(*three, LOSS).loss > 0
    limited.rewrite("files were read again")


@pytest.mark.alone
def test_a_weight_counts_on_the_device(limited: Limited) -> None:
    """Beside other tests its callers would be the limit, and not the device."""
    done, end = {"bob": 0, "carol": 0}, threading.Event()
    logits, labels = tensors(64, classes=19)

    def flood(name: str, client: LossClient) -> None:
        while not end.is_set():
            client.compute(logits, labels, LOSS)
            done[name] += 1

    with (
        limited.connect("bob") as bob,
        limited.connect("carol") as carol,
        ThreadPoolExecutor(2 * IN_FLIGHT) as threads,
    ):
        calls = [threads.submit(flood, *one) for one in (("bob", bob), ("carol", carol)) for _ in range(IN_FLIGHT)]
        try:
            assert eventually(lambda: min(done.values()) > 10)
            before = dict(done)
            assert eventually(lambda: done["carol"] - before["carol"] > 20)
            served = {name: done[name] - before[name] for name in done}
        finally:
            end.set()
        for call in calls:
            call.result(60)
    assert served["bob"] > 1.5 * served["carol"]


def test_names_of_runs_are_shown_to_who_has_a_token(limited: Limited) -> None:
    with limited.connect("bob", run="cityscapes-7") as bob:
        bob.compute(*IMAGE, LOSS)
    for path in ("/metrics", "/status"):
        assert "cityscapes-7" in limited.page(path, Authorization=f"Bearer {TOKENS['carol']}")
        for headers in ({}, {"Authorization": "Bearer " + "x" * 20}):
            shown = limited.page(path, **headers)
            assert "cityscapes-7" not in shown
            assert "city~" in shown
    assert json.loads(limited.page("/status"))["samples"]["lovasz_run_loss"]


def test_clients_on_one_unix_socket_are_told_apart(tmp_path: Path) -> None:
    listen = f"unix:{tmp_path}/socket"
    with ForkedServer(["--device", "cpu", "--listen", listen, "--memory-budget", "64KiB"]) as server:

        def peers() -> set[object]:
            return {line["peer"] for line in server.log if line["event"] == "a request was refused"}

        def refused(client: LossClient) -> set[object]:
            with pytest.raises(ServerOverloadedError, match="whole budget"):
                client.compute(*IMAGE, LOSS)
            return peers()

        with LossClient(server.target, timeout=30) as one, LossClient(server.target, timeout=30) as other:
            assert eventually(lambda: len(refused(one)) == 1)
            assert eventually(lambda: len(refused(other)) == 2)  # The log has one such line a second.
            assert len(refused(one)) == 2
        assert all(str(peer).startswith("unix:client=") for peer in peers())
