"""The page for people, in a real browser beside a real server."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fork_server import ForkedServer
from support.scrape import metric
from support.waiting import eventually

from lovasz.client import CallAbortedError, Joint, LossClient, LovaszSoftmax
from lovasz.server.launch import ServerProcess

TENSORS = np.random.RandomState(0).randn(2, 5, 128, 128).astype(np.float32), np.zeros((2, 128, 128), np.uint8)
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def status_of(server: ServerProcess) -> dict[str, Any]:
    with urllib.request.urlopen(server.metrics_url.replace("/metrics", "/status")) as page:
        content: dict[str, Any] = json.load(page, parse_constant=pytest.fail)  # NaN, which browsers do not take.
    return content


def test_the_numbers_name_the_ranks_that_joint_steps_wait_for() -> None:
    with ForkedServer(["--device", "cpu", "--joint-timeout", "2"]) as server, LossClient(server.target) as client:
        tensors = np.zeros((1, 3, 4, 4), np.float32), np.zeros((1, 4, 4), np.uint8)
        waiting = [client.submit(*tensors, LovaszSoftmax(), joint=Joint("cityscapes", rank, 4, 7)) for rank in (0, 3)]
        assert eventually(lambda: metric(server, "lovasz_joint_ranks_waiting") == 2)
        (step,) = status_of(server)["joint_steps"]
        assert {**step, "seconds": 0.0} == {
            "run": "cityscapes",
            "step": 7,
            "seconds": 0.0,
            "world_size": 4,
            "missing": "1, 2",
            "missing_ranks": 2,
            "first_missing_rank": 1,
            "evaluation": False,
            "never_evaluated": "",
        }
        assert metric(server, "lovasz_joint_step_number", run="cityscapes") == 7
        assert metric(server, "lovasz_joint_step_missing_ranks", run="cityscapes") == 2
        assert metric(server, "lovasz_joint_step_first_missing_rank", run="cityscapes") == 1
        assert 0 < metric(server, "lovasz_joint_step_wait_seconds", run="cityscapes") < 2
        for call in waiting:
            with pytest.raises(CallAbortedError, match=r"ranks 1, 2 of 4 did not arrive at step 7 of run 'cityscapes'"):
                call.result()
        assert status_of(server)["joint_steps"] == []
        assert metric(server, "lovasz_joint_step_missing_ranks") == 0


def test_what_is_not_a_number_is_null() -> None:
    with ForkedServer(["--device", "cpu"]) as server, LossClient(server.target) as client:
        logits, labels = np.full((1, 3, 4, 4), np.nan, np.float32), np.zeros((1, 4, 4), np.uint8)
        assert np.isnan(client.compute(logits, labels, LovaszSoftmax(), joint=Joint("diverged", 0, 1, 0)).loss)
        assert status_of(server)["samples"]["lovasz_run_loss"] == [[{"run": "diverged", "mode": "train"}, None]]


def test_other_paths_are_told_what_there_is(server: ServerProcess) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404") as refused:
        urllib.request.urlopen(server.metrics_url + "x")
    assert b"/status" in refused.value.read()
    refused.value.close()


def test_other_methods_than_get_are_refused_and_head_has_no_body(server: ServerProcess) -> None:
    page = urllib.request.Request(server.metrics_url, method="HEAD")
    with urllib.request.urlopen(page) as answer:
        assert answer.status == 200
        assert answer.read() == b""
    with pytest.raises(urllib.error.HTTPError, match="405") as refused:
        urllib.request.urlopen(urllib.request.Request(server.metrics_url, method="POST", data=b"x"))
    refused.value.close()


def test_callers_that_say_nothing_or_go_away_hold_up_nobody_and_leave_no_trace_in_the_log(
    server: ServerProcess,
) -> None:
    lines = len(server.log)
    address = urllib.parse.urlsplit(server.metrics_url)
    with ExitStack() as silent:
        for _ in range(100):
            connection = silent.enter_context(socket.create_connection((address.hostname, address.port)))
            connection.sendall(b"GET /met")
    assert eventually(lambda: metric(server, "lovasz_device_healthy") == 1)
    assert len(server.log) == lines


@pytest.mark.skipif(BROWSER is None, reason="needs a browser (Debian: apt-get install chromium)")
def test_a_browser_shows_how_the_server_fares(tmp_path: Path) -> None:
    with (
        ForkedServer(["--device", "cpu", "--joint-timeout", "60"]) as server,
        LossClient(server.target) as client,
        under_load(client),
    ):
        waiting = client.submit(*TENSORS, LovaszSoftmax(), joint=Joint("cityscapes <7>", 0, 3, 7), timeout=45)
        assert eventually(lambda: metric(server, "lovasz_joint_ranks_waiting") == 1)
        page = server.metrics_url.replace("/metrics", "/")
        text = in_browser(tmp_path, page, ["--dump-dom"]).decode()
        words = re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", text, flags=re.DOTALL)
        words = " ".join(words.split())
        assert "● serving" in words
        assert re.search(r"version \S+, cpu \(CPU, \d+ threads, numba\), up", words)
        assert re.search(r"Time of a request [\d.]+ m?s", words)
        assert re.search(r"receiving [\d.]+ m?s .* computing [\d.]+ m?s copying the gradient [\d.]+ m?s sending", words)
        assert re.search(r"Device busy [\d.]+ % [\d.]+ [MG]iB of [\d.]+ GiB taken", words)
        assert re.search(r"OK [1-9]\d*\b", words)
        assert re.search(r"cityscapes &lt;7&gt; 7 \S+ m?s 1, 2 \(of 3\)", words), "the run's name is no markup"
        assert not waiting.done()
        if folder := os.environ.get("SCREENSHOTS"):  # How the one in the docs was taken.
            in_browser(tmp_path, page, [f"--screenshot={folder}/status_page.png", "--window-size=1080,700"])
        for rank in (1, 2):  # Or the client would wait for its timeout.
            client.submit(*TENSORS, LovaszSoftmax(), joint=Joint("cityscapes <7>", rank, 3, 7))
        assert waiting.result().loss > 0


@contextmanager
def under_load(client: LossClient) -> Iterator[None]:
    done = threading.Event()

    def calls() -> None:
        while not done.wait(0.02):
            client.compute(*TENSORS, LovaszSoftmax())

    thread = threading.Thread(target=calls)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def in_browser(folder: Path, page: str, options: list[str]) -> bytes:
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-proxy-server", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder}/profile", "--virtual-time-budget=4000", *options, page]
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout
