"""The client's side of shared memory against a server that is stalled: nothing waits beyond its timeout."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from lovasz import wire
from lovasz.client import DeadlineExceededError, LossClient, LovaszSoftmax, memory_socket, shared_memory
from lovasz.client.connection import Connection
from lovasz.client.errors import LossError, ServerUnavailableError
from lovasz.client.memory_socket import SocketError
from lovasz.client.shared_memory import Session, SharedMemory
from lovasz.v1 import loss_pb2 as pb

TIMEOUT = 60.0


@pytest.fixture
def stalled(tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """The path of a server that is stopped (SIGSTOP): the kernel accepts connections, and nobody answers.

    With it comes what listens for shared memory.
    """
    path = str(tmp_path / "s")
    with (
        socket.socket(socket.AF_UNIX) as messages,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as memory,
    ):
        for listener, where in ((messages, path), (memory, path + wire.MEMORY_SUFFIX)):
            listener.bind(where)
            listener.listen()
        memory.settimeout(TIMEOUT)
        yield path, memory


def connection_with(info: Callable[[float], None]) -> Any:
    """A connection of which only whether a server answers is ever asked."""
    return SimpleNamespace(info=info)


def unanswered(seconds: float) -> None:
    raise SocketError(grpc.StatusCode.UNAVAILABLE, "nobody answers")


NOBODY = connection_with(unanswered)
"""A connection to no server."""


def greeted(memory: socket.socket) -> socket.socket:
    """A connection, with the server's first packet."""
    connection, _ = memory.accept()
    connection.settimeout(TIMEOUT)
    reply(connection)
    return connection


def reply(connection: socket.socket, error: str = "") -> None:
    connection.send(pb.SharedMemoryReply(session=b"name", error=error, takes_calls=True).SerializeToString())


@pytest.mark.parametrize("transport", ["auto", "shm"])
def test_a_call_has_its_timeout_once(
    stalled: tuple[str, socket.socket], monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """It waits for shared memory, and asks whether a server answers, in this time."""
    ask, left = Connection.info, []

    def info(connection: Connection, timeout: float) -> pb.GetServerInfoResponse:
        left.append(timeout)
        return ask(connection, timeout)

    monkeypatch.setattr(Connection, "info", info)
    logits, labels = np.zeros((1, 3, 4), np.float32), np.zeros((1, 4), np.uint8)
    with (
        LossClient(f"unix:{stalled[0]}", transport=transport, timeout=0.3) as client,
        pytest.raises(DeadlineExceededError),
    ):
        client.compute(logits, labels, LovaszSoftmax())
    assert len(left) == 1
    assert left[0] <= 0.0


def test_a_thread_waits_no_longer_than_its_timeout_for_another_that_waits_for_the_server(
    stalled: tuple[str, socket.socket],
) -> None:
    shared = SharedMemory(stalled[0], NOBODY)
    with ThreadPoolExecutor() as threads:
        first = threads.submit(shared.session, TIMEOUT)
        connection, _ = stalled[1].accept()
        for wait in (shared.session, lambda timeout: shared.share(shared.take(1), timeout)):
            with pytest.raises(SocketError) as late:
                wait(0.01)
            assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        reply(connection)
        assert first.result(TIMEOUT) is shared.session(0.01)
    shared.close()
    connection.close()


def test_a_region_is_released_without_waiting(
    stalled: tuple[str, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock stands still meanwhile: whoever waited for a reply would wait for ever."""
    shared = SharedMemory(stalled[0], NOBODY)
    regions = [shared.take(1) for _ in range(3)]
    with ThreadPoolExecutor() as threads:
        connecting = threads.submit(greeted, stalled[1])
        session = shared.session(TIMEOUT)
        connection = connecting.result(TIMEOUT)
        released: list[int] = []

        def shares(session: Session, number: int, error: str = "") -> int:
            """Shares a region; returns its number."""
            sharing = threads.submit(session.share, regions[number], TIMEOUT)
            while (request := received(connection)).release:
                released.append(request.region)
                reply(connection)  # To the release, late.
            reply(connection, error)
            sharing.result(TIMEOUT)
            return request.region

        first = shares(session, 0)
        shares(session, 1)
        with monkeypatch.context() as patched:
            patched.setattr(memory_socket, "time", SimpleNamespace(monotonic=lambda: 0.0))
            regions[0].close()
        assert not session.socket.is_closed
        with pytest.raises(LossError, match="no room"):  # The late reply is nobody's, the next one is the share's.
            shares(session, 2, "no room")
        assert released == [first]
    shared.close()
    connection.close()


def test_what_was_released_is_settled_when_the_server_has_answered(stalled: tuple[str, socket.socket]) -> None:
    """The packet that is waited for comes after the release, and changes nothing."""
    shared = SharedMemory(stalled[0], NOBODY)
    with ThreadPoolExecutor() as threads:
        connecting = threads.submit(greeted, stalled[1])
        session = shared.session(TIMEOUT)
        connection = connecting.result(TIMEOUT)
        region = shared.take(1)
        sharing = threads.submit(session.share, region, TIMEOUT)
        number = received(connection).region
        reply(connection)
        sharing.result(TIMEOUT)
        region.close()
        settling = threads.submit(shared.settle)
        packets = [received(connection) for _ in range(2)]
        assert [(packet.region, packet.release) for packet in packets] == [(number, True), (0, True)]
        reply(connection)
        assert not settling.done()
        reply(connection)
        settling.result(TIMEOUT)
    assert not session.socket.is_closed
    shared.close()
    connection.close()


def test_no_time_left_for_the_second_look_is_a_timeout(
    stalled: tuple[str, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the news that the server takes no shared memory, after which a client does without it for a while."""
    now = [0.0]
    monkeypatch.setattr(shared_memory, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def answered(seconds: float) -> None:
        now[0] += seconds

    stalled[1].close()  # Connections are refused.
    shared = SharedMemory(stalled[0], connection_with(answered))
    with pytest.raises(SocketError) as late:
        shared.session(TIMEOUT)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    now[0] = 0.0
    shared = SharedMemory(stalled[0], connection_with(lambda seconds: None))
    with pytest.raises(ServerUnavailableError, match="no shared memory: Connection refused"):
        shared.session(TIMEOUT)


def received(connection: socket.socket) -> pb.SharedMemoryRequest:
    data, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 1)
    for descriptor in descriptors:
        socket.close(descriptor)
    return pb.SharedMemoryRequest.FromString(data)
