"""A server whose shared-memory socket comes late: after a client's first look, and before gRPC answers the client."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lovasz import wire
from lovasz.client.connection import Connection
from lovasz.server.launch import ServerProcess
from lovasz.v1 import loss_pb2 as pb


@contextmanager
def late_socket(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """In place of the socket is what a server that was killed leaves; the next answer of gRPC puts it back.

    Yields:
        The seconds that each call of gRPC had which asked whether a server answers.
    """
    path = server.target.removeprefix(wire.UNIX) + wire.MEMORY_SUFFIX
    kept, left_over = f"{path}.kept", f"{path}.left"
    os.link(path, kept)  # The server sees that this is its own file, and does not make another.
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(left_over)
    os.replace(left_over, path)
    ask, asked = Connection.info, []

    def put_back() -> None:
        if os.path.exists(kept):
            os.replace(kept, path)

    def info(connection: Connection, timeout: float) -> pb.GetServerInfoResponse:
        asked.append(timeout)
        put_back()
        return ask(connection, timeout)

    monkeypatch.setattr(Connection, "info", info)
    try:
        yield asked
    finally:
        put_back()
