"""A way to a server on which answers may be held up, as on a network that is full."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from types import TracebackType

_READ_BYTES = 64 << 10
_PATIENCE_SECONDS = 60.0


class SlowPath:
    """Passes all bytes on; a ``with`` ends it.

    Attributes:
        target: where it takes connections.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._server = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._is_open = threading.Event()
        self._is_open.set()
        self._before_bytes = 0
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def __enter__(self) -> SlowPath:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(_PATIENCE_SECONDS)
            assert not thread.is_alive()
        for one in (self._listener, *self._connections):
            one.close()

    def hold(self, after: int) -> None:
        """Holds up what the server sends after so many bytes more: it also says how much it takes of a request."""
        self._before_bytes = after
        self._is_open.clear()

    def cut(self) -> None:
        """Ends all connections; what was held up is lost. New ones pass everything on."""
        for one in self._connections:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self.go_on()

    def go_on(self) -> None:
        """Passes on what was held up."""
        self._is_open.set()

    def _start(self, run: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._server)
                self._connections += [near, far]
                self._start(self._pass_on, near, far, int)
                self._start(self._pass_on, far, near, self._wait)

    def _wait(self, nbytes: int) -> None:
        self._before_bytes -= nbytes
        if self._before_bytes < 0:
            assert self._is_open.wait(_PATIENCE_SECONDS)

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket, wait: Callable[[int], object]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_READ_BYTES):
                wait(len(data))
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
