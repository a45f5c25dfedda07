"""The first start on a host: the server compiles for a minute or two, says so at once, and can be stopped meanwhile."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.messages import tensors
from support.waiting import eventually

from lovasz.client import LossClient, LovaszSoftmax, ServerUnavailableError, cli
from lovasz.client.retry import FIRST_ATTEMPTS

pytest.importorskip("numba", reason="without Numba, nothing is compiled")

STARTING = "starting: it compiles, a minute or two the first time"


class Starting:
    """A server that has nothing compiled yet."""

    def __init__(self, cache: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
            ports = [taken.getsockname()[1] for taken in (one, other)]
        self.target, self.page = f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"
        command = [sys.executable, "-m", "lovasz.server", "--device", "cpu", "--log-format", "json"]
        command += ["--listen", self.target, "--metrics-listen", f"127.0.0.1:{ports[1]}"]
        self.temporary = cache / "temporary"
        self.temporary.mkdir()
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "TMPDIR": str(self.temporary)}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.log: list[dict[str, object]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr:
            for line in self.process.stderr:
                self.log.append(json.loads(line))

    def logged(self, event: str) -> bool:
        return any(str(line["event"]).startswith(event) for line in self.log)

    def end(self, signum: int) -> int:
        """Its exit status. It has to end long before everything is compiled."""
        self.process.send_signal(signum)
        status = self.process.wait(20)
        self._reader.join()
        return status

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()


@pytest.fixture
def starting(tmp_path: Path) -> Iterator[Starting]:
    server = Starting(tmp_path)
    yield server
    server.close()


def test_a_first_start_says_what_it_does_and_ends_at_once(
    starting: Starting, capsys: pytest.CaptureFixture[str]
) -> None:
    assert eventually(lambda: starting.logged("compiling: a minute or two the first time"))
    assert [line["event"] for line in starting.log[:1]] == ["starting"]
    with grpc.insecure_channel(starting.target) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
    with LossClient(starting.target) as client:
        (device,) = client.server_info().devices
        assert (device.starting, device.healthy) == (True, False)
        # Longer than the attempts to reach an address that may be wrong.
        with pytest.raises(ServerUnavailableError, match="the server is starting: it compiles, a minute or two"):
            client.compute(*tensors(8), LovaszSoftmax(), timeout=1.5 * FIRST_ATTEMPTS)
    assert cli.main(["ping", starting.target, "--count", "1", "--timeout", "20"]) == 1
    assert STARTING in capsys.readouterr().out
    with urllib.request.urlopen(f"{starting.page}/status") as status:
        numbers = json.load(status)
    assert numbers["starting"]
    (refused,) = [
        value for labels, value in numbers["samples"]["lovasz_rejections_total"] if labels == {"reason": "starting"}
    ]
    assert refused > FIRST_ATTEMPTS
    assert not starting.logged("ready")
    assert starting.end(signal.SIGTERM) == 0
    assert starting.log[-1]["event"] == "stopped while it started"
    assert not os.listdir(starting.temporary)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_start_ends_at_once_before_anything_listens(starting: Starting, signum: signal.Signals) -> None:
    assert eventually(lambda: starting.logged("starting"))
    assert starting.end(signum) == 0
    assert not starting.logged("ready")
