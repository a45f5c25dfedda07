"""Plain TCP sockets that move as many bytes as a request and its answer: a server, and its client."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Sequence

HOST = "127.0.0.1"

_SIZES = struct.Struct("<QQ")
"""Sent before each request: how many bytes it has, and how many its answer shall have."""


class SocketServer:
    """Receives requests in place and answers with as many bytes as they ask for. Runs in a child process."""

    def __init__(self) -> None:
        self._listener = socket.create_server((HOST, 0))
        threading.Thread(target=self._accept, daemon=True).start()

    def port(self) -> int:
        port: int = self._listener.getsockname()[1]
        return port

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    request, answer = bytearray(), bytearray()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection:
        try:
            while True:
                sizes = bytearray(_SIZES.size)
                _receive(connection, memoryview(sizes))
                incoming, wanted = _SIZES.unpack(sizes)
                if len(request) != incoming or len(answer) != wanted:  # Only the first time.
                    request, answer = bytearray(incoming), bytearray(b"\1") * wanted
                _receive(connection, memoryview(request))
                connection.sendall(answer)
        except OSError:
            return


def _receive(connection: socket.socket, place: memoryview) -> None:
    """Fills the whole of ``place``."""
    while place:
        count = connection.recv_into(place)
        if not count:
            raise ConnectionResetError
        place = place[count:]


class SocketPeer:
    """A connection to a :class:`SocketServer`, for requests and answers of one size."""

    def __init__(self, port: int, parts: Sequence[memoryview], answer_bytes: int) -> None:
        """
        Args:
            parts: the bytes that a call sends.
        """
        self._socket = socket.create_connection((HOST, port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._parts = (memoryview(_SIZES.pack(sum(part.nbytes for part in parts), answer_bytes)), *parts)
        self._answer = bytearray(b"\1") * answer_bytes

    def __call__(self) -> None:
        for part in self._parts:
            self._socket.sendall(part)
        _receive(self._socket, memoryview(self._answer))

    def close(self) -> None:
        self._socket.close()
