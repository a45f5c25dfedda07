"""A connection of HTTP/2 that does what no gRPC client does: it opens calls and says nothing, sends as slowly as a test
likes, and takes no more of an answer than it is told to."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections import defaultdict
from functools import partial
from types import TracebackType

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW_SIZE = 3, 4
_FRAME_BYTES = 16 << 10
_PATIENCE_SECONDS = 30.0


def message(data: bytes) -> bytes:
    """A message of gRPC, as it stands in a stream."""
    return struct.pack(">BI", 0, len(data)) + data


class Connection:
    """One connection to a gRPC server; a ``with`` closes it.

    Attributes:
        ended: the streams that the server has ended.
        max_streams: the most streams at a time, as the server has said; None: it has not said.
        received: the bytes of each stream's answer.
    """

    def __init__(self, target: str, window: int = 65_535) -> None:
        """Connects.

        Args:
            target: HOST:PORT.
            window: how many bytes of each answer the server may send.
        """
        host, _, port = target.rpartition(":")
        self._target = target
        self._socket = socket.create_connection((host, int(port)), _PATIENCE_SECONDS)
        self._socket.settimeout(None)
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._windows: dict[int, int] = {0: 65_535}
        self._initial_window = 65_535
        self._next_stream = 1
        self._closed = False
        self.ended: set[int] = set()
        self.max_streams: int | None = None
        self.received: defaultdict[int, bytearray] = defaultdict(bytearray)
        self._knows_settings = threading.Event()
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self._frame(_SETTINGS, 0, 0, struct.pack(">HI", _INITIAL_WINDOW_SIZE, window))
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._knows_settings.wait(_PATIENCE_SECONDS)

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join(_PATIENCE_SECONDS)
        self._socket.close()

    def open(self, method: str) -> int:
        """Opens a call, and sends no message; returns its stream."""
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": method,
            ":authority": self._target,
            "te": "trailers",
            "content-type": "application/grpc",
        }
        block = b"".join(
            b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
            for name, value in fields.items()
        )
        with self._changed:
            stream, self._next_stream = self._next_stream, self._next_stream + 2
            self._windows[stream] = self._initial_window
        self._frame(_HEADERS, _END_HEADERS, stream, block)
        return stream

    def send(self, stream: int, data: bytes, *, end: bool = False) -> bool:
        """Sends bytes of a call, as far as the server takes them; False if it has ended the call."""
        parts = [data[place : place + _FRAME_BYTES] for place in range(0, len(data), _FRAME_BYTES)] or [b""]
        for number, part in enumerate(parts, 1):
            with self._changed:
                room = self._changed.wait_for(partial(self._has_room, stream, len(part)), _PATIENCE_SECONDS)
                if not room or self._gone(stream):
                    return False
                self._windows[0] -= len(part)
                self._windows[stream] -= len(part)
            self._frame(_DATA, _END_STREAM if end and number == len(parts) else 0, stream, part)
        return True

    def call(self, method: str, data: bytes) -> int:
        """Makes a call with one message; returns its stream."""
        stream = self.open(method)
        self.send(stream, message(data), end=True)
        return stream

    def take(self, stream: int, nbytes: int) -> None:
        """Lets the server send so many more bytes of an answer (0: of all answers together)."""
        self._frame(_WINDOW_UPDATE, 0, stream, struct.pack(">I", nbytes))

    @property
    def closed(self) -> bool:
        """Whether the server has closed the connection."""
        return self._closed

    def _has_room(self, stream: int, nbytes: int) -> bool:
        return self._gone(stream) or min(self._windows[0], self._windows[stream]) >= nbytes

    def _gone(self, stream: int) -> bool:
        return stream in self.ended or self._closed

    def _frame(self, kind: int, flags: int, stream: int, data: bytes) -> None:
        with self._sending, contextlib.suppress(OSError):
            self._socket.sendall(struct.pack(">I", len(data))[1:] + struct.pack(">BBI", kind, flags, stream) + data)

    def _exactly(self, nbytes: int) -> bytes:
        data = bytearray()
        while len(data) < nbytes:
            part = self._socket.recv(nbytes - len(data))
            if not part:
                raise ConnectionError
            data += part
        return bytes(data)

    def _read(self) -> None:
        try:
            while True:
                head = self._exactly(9)
                length, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
                stream = int.from_bytes(head[5:], "big") & 0x7FFF_FFFF
                self._take(kind, flags, stream, self._exactly(length))
        except OSError:
            pass
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()

    def _take(self, kind: int, flags: int, stream: int, data: bytes) -> None:
        with self._changed:
            if kind == _SETTINGS and not flags & _ACK:
                for place in range(0, len(data), 6):
                    name, value = struct.unpack_from(">HI", data, place)
                    if name == _MAX_CONCURRENT_STREAMS:
                        self.max_streams = value
                    if name == _INITIAL_WINDOW_SIZE:
                        for other in self._windows:
                            self._windows[other] += value - self._initial_window if other else 0
                        self._initial_window = value
                self._knows_settings.set()
            elif kind == _WINDOW_UPDATE and stream in self._windows:
                self._windows[stream] += int.from_bytes(data, "big") & 0x7FFF_FFFF
            elif kind == _RST_STREAM or (kind in (_HEADERS, _DATA) and flags & _END_STREAM):
                self.ended.add(stream)
            if kind == _DATA:
                self.received[stream] += data
            self._changed.notify_all()
        if kind == _SETTINGS and not flags & _ACK:
            self._frame(_SETTINGS, _ACK, 0, b"")
        elif kind == _PING and not flags & _ACK:
            self._frame(_PING, _ACK, 0, data)
