"""A peer that vanishes without closing its connection: a dead host, a network that drops packets, a frozen proxy."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.messages import tensors

from lovasz.client import LossClient, LovaszSoftmax
from lovasz.server.launch import ServerProcess

ISOLATED = ("unshare", "--net")
NOTICED_SECONDS = 35.0
"""Half a minute, and what a busy machine may add."""


class Forwarder:
    """Forwards connections to a server, until it is frozen: then the kernel still acknowledges what it receives.

    Connections that are made later are forwarded.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._frozen: list[tuple[socket.socket, socket.socket]] = []
        self._ended = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def freeze(self) -> int:
        """Forwards nothing more over the connections that there are; returns how many."""
        self._frozen, self._pairs = self._pairs, []
        return len(self._frozen)

    def left_by_the_server(self) -> bool:
        """Whether the server has closed its side of the frozen connections."""
        return all(_has_ended(there) for _, there in self._frozen)

    def close(self) -> None:
        self._ended = True
        self._thread.join()
        self._listener.close()
        for pair in self._frozen + self._pairs:
            for end in pair:
                end.close()

    def _run(self) -> None:
        while not self._ended:
            other_end = {end: pair[1 - i] for pair in self._pairs for i, end in enumerate(pair)}
            for ready in select.select([self._listener, *other_end], [], [], 0.05)[0]:
                if ready is self._listener:
                    self._pairs.append((self._listener.accept()[0], socket.create_connection(self._server)))
                    continue
                with suppress(OSError):
                    if data := ready.recv(1 << 16):
                        other_end[ready].sendall(data)
                        continue
                self._pairs = [pair for pair in self._pairs if ready not in pair]
                ready.close()
                other_end[ready].close()


def _has_ended(connection: socket.socket) -> bool:
    """Whether the other side has closed a connection that may hold data."""
    connection.settimeout(0.01)
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


@pytest.fixture
def forwarder(server: ServerProcess) -> Iterator[Forwarder]:
    forwarder = Forwarder(server.target)
    yield forwarder
    forwarder.close()


@pytest.mark.timeout(150)
def test_both_sides_notice_a_frozen_connection_within_half_a_minute(forwarder: Forwarder) -> None:
    with LossClient(forwarder.target) as client:
        first = client.compute(*tensors(8), LovaszSoftmax()).loss
        assert forwarder.freeze() == 1
        began = time.monotonic()
        assert client.compute(*tensors(8), LovaszSoftmax()).loss == first, "the call is repeated on a new connection"
        assert 1 < time.monotonic() - began < NOTICED_SECONDS
        while not forwarder.left_by_the_server():
            assert time.monotonic() - began < NOTICED_SECONDS
            time.sleep(0.1)


def can_lose_packets() -> bool:
    rule = "ip link set lo up && iptables -A INPUT -p tcp --dport 9 -j DROP"
    try:
        tried = subprocess.run([*ISOLATED, "sh", "-c", rule], capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return tried.returncode == 0


@pytest.mark.timeout(150)
@pytest.mark.skipif(not can_lose_packets(), reason="needs root, unshare, ip and iptables")
def test_both_sides_notice_lost_packets_within_half_a_minute() -> None:
    script = Path(__file__).parents[1] / "support" / "vanished_peer.py"
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    ran = subprocess.run(
        [*ISOLATED, sys.executable, str(script)], capture_output=True, text=True, timeout=110, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    seconds = json.loads(ran.stdout)
    assert seconds["lost"] >= 1
    assert 1 < seconds["client"] < NOTICED_SECONDS, "the call is repeated on a new connection"
    assert seconds["server"] < NOTICED_SECONDS
    assert seconds["after"] >= 1
