"""What TCP still holds: seen for the ports that are asked about, and waited for."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from lovasz.server.transport import tcp_queues
from lovasz.server.transport.tcp_queues import wait_until_received

FAMILIES = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
LONG_SECONDS = 60.0


def full(connection: socket.socket) -> None:
    """Fills a connection until it takes no more."""
    connection.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            connection.send(bytes(1 << 16))


@pytest.fixture(params=FAMILIES, ids=["IPv4", "IPv6"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket, int]]:
    """Of a server, and of its caller, which reads nothing; and the server's port."""
    family, host = request.param
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((host, 0), family=family))
        caller = stack.enter_context(socket.create_connection(listener.getsockname()[:2]))
        yield stack.enter_context(listener.accept()[0]), caller, listener.getsockname()[1]


def test_a_connection_that_has_sent_everything_is_not_waited_for(
    ends: tuple[socket.socket, socket.socket, int],
) -> None:
    server, _, port = ends
    server.sendall(b"answer")
    assert wait_until_received([port], time.monotonic() + LONG_SECONDS) == 0


def test_what_is_held_is_counted_when_time_is_up(ends: tuple[socket.socket, socket.socket, int]) -> None:
    server, _, port = ends
    full(server)
    assert wait_until_received([port], 0.0) == 1
    assert wait_until_received([port], time.monotonic() + 0.1) == 1
    assert wait_until_received([port + 1], time.monotonic() + LONG_SECONDS) == 0
    assert wait_until_received([], time.monotonic() + LONG_SECONDS) == 0
    assert server.fileno() >= 0
    server.getpeername()  # Looking has not closed it.


def test_what_is_held_is_waited_for(ends: tuple[socket.socket, socket.socket, int]) -> None:
    server, caller, port = ends
    full(server)
    left: list[int] = []
    waiting = threading.Thread(target=lambda: left.append(wait_until_received([port], time.monotonic() + LONG_SECONDS)))
    waiting.start()
    server.shutdown(socket.SHUT_WR)
    while caller.recv(1 << 20):
        pass
    waiting.join(LONG_SECONDS)
    assert left == [0]


def test_a_connection_that_ends_is_not_waited_for_any_more(ends: tuple[socket.socket, socket.socket, int]) -> None:
    server, caller, port = ends
    full(server)
    caller.close()  # With unread bytes: a reset.
    assert wait_until_received([port], time.monotonic() + LONG_SECONDS) == 0


def test_other_descriptors_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = socket.socketpair()
    reading, writing = os.pipe()
    with left, right, socket.socket(type=socket.SOCK_DGRAM) as datagrams, socket.create_server(("", 0)) as listener:
        full(left)
        ports = [listener.getsockname()[1], 0]
        assert wait_until_received(ports, time.monotonic() + LONG_SECONDS) == 0
        os.close(writing)
        assert os.read(reading, 1) == b""
        os.close(reading)
        monkeypatch.setattr(tcp_queues.os, "listdir", lambda _: [str(reading), str(1 << 30)])
        assert wait_until_received(ports, time.monotonic() + LONG_SECONDS) == 0
        assert datagrams.fileno() >= 0


def test_where_descriptors_cannot_be_listed_nothing_is_waited_for(
    ends: tuple[socket.socket, socket.socket, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _, port = ends
    full(server)
    monkeypatch.setattr(tcp_queues, "_DESCRIPTORS", "/nowhere")
    assert wait_until_received([port], time.monotonic() + LONG_SECONDS) == 0
