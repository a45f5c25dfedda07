"""A way to a server on which answers may be held up, as on a network that is full."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType

_READ_BYTES = 64 << 10
_BEFORE_BYTES = 128 << 10
"""What it still passes on: the server also says how much it takes of a request."""
_PATIENCE_SECONDS = 60.0


class SlowPath:
    """Passes all bytes on; a ``with`` ends it.

    Attributes:
        target: where it takes connections.
        is_open: cleared to hold up what the server sends, after the first 128 KiB.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._server = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.is_open = threading.Event()
        self.is_open.set()
        self._sockets = [self._listener]
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def __enter__(self) -> SlowPath:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.is_open.set()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(_PATIENCE_SECONDS)
            assert not thread.is_alive()
        for one in self._sockets:
            one.close()

    def _start(self, run: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._server)
                self._sockets += [near, far]
                self._start(self._pass_on, near, far, None)
                self._start(self._pass_on, far, near, self.is_open)

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket, is_open: threading.Event | None) -> None:
        before = _BEFORE_BYTES
        with contextlib.suppress(OSError):
            while data := source.recv(_READ_BYTES):
                if is_open is not None and not is_open.is_set():
                    before -= len(data)
                    if before < 0:
                        is_open.wait(_PATIENCE_SECONDS)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
