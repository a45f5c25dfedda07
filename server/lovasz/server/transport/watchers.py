"""Those who watch the health of a service: each is told its status, and again whenever it changes.

gRPC's own servicer sends while it holds a lock that every call of the health service takes, and the end of such a call,
too, which gRPC's only thread for such events waits for. So a caller that does not read, or that hangs up at the wrong
moment, would end health, and with it the server. Here nobody waits for a caller but a few threads, and not for long.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import grpc
from grpc_health.v1 import health_pb2

from lovasz.server.transport.threads import OwnThreads

_log = logging.getLogger(__name__)

_THREADS = 4
MOST_WATCHERS = 1000
"""How many may watch: each takes some 20 KB, and needs no token."""
STALL_SECONDS = 5.0
"""How long a status may wait for its caller to read it."""

Send = Callable[[health_pb2.HealthCheckResponse | None], object]
"""Sends a status, and waits until gRPC has taken it or the call has ended; None ends the call."""


@dataclass(eq=False)
class _Watcher:
    """A caller.

    Attributes:
        told: the last status that it was told; None: none yet.
        is_sending: whether a thread tells it, or will.
        since: since when a status waits to be taken (``time.monotonic``); None: none does.
    """

    service: str
    send: Send
    cut_off: Callable[[], object]
    told: int | None = None
    is_sending: bool = False
    since: float | None = None


class Watchers(OwnThreads):
    """All that watch."""

    def __init__(self, status_of: Callable[[str], int]) -> None:
        """Nobody does.

        Args:
            status_of: the status of the service of this name; takes no lock.
        """
        super().__init__(_THREADS, "health-watch")
        self._status_of = status_of
        self._lock = threading.Lock()
        """Never held while something is sent."""
        self._watchers: set[_Watcher] = set()

    def __len__(self) -> int:
        return len(self._watchers)

    def add(self, service: str, context: grpc.ServicerContext, send: Send) -> None:
        """A caller begins to watch.

        Raises:
            Exception: gRPC's, which aborts the call: too many do.
        """
        watcher = _Watcher(service, send, context.cancel)
        with self._lock:
            has_room = len(self._watchers) < MOST_WATCHERS
            if has_room:
                self._watchers.add(watcher)
        if not has_room:
            text = f"{MOST_WATCHERS} callers watch health, the maximum; call Check, or try again later"
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        if context.add_callback(partial(self._end, watcher)):
            self._tell(watcher)
        else:
            self._end(watcher)

    def tell(self) -> None:
        """A status may have changed."""
        with self._lock:
            watchers = list(self._watchers)
        for watcher in watchers:
            self._tell(watcher)

    def check(self) -> None:
        """A chore: cuts off those that do not read."""
        until = time.monotonic() - STALL_SECONDS
        with self._lock:
            stalled = [one for one in self._watchers if one.since is not None and one.since < until]
        for watcher in stalled:
            watcher.cut_off()

    def _tell(self, watcher: _Watcher) -> None:
        with self._lock:
            is_told = watcher.told == self._status_of(watcher.service)
            if is_told or watcher.is_sending or watcher not in self._watchers:
                return
            watcher.is_sending = True
        with suppress(RuntimeError):  # The threads have ended: the server stops.
            self._own_threads.submit(self._send, watcher)

    def _send(self, watcher: _Watcher) -> None:
        """Sends the status until it is the one that the caller was told last."""
        try:
            while self._begin(watcher):
                watcher.send(health_pb2.HealthCheckResponse(status=watcher.told))
        except Exception:
            _log.exception("a fault of the health service")
            self._end(watcher)

    def _begin(self, watcher: _Watcher) -> bool:
        """Whether there is something to send."""
        with self._lock:
            status = self._status_of(watcher.service)
            if watcher not in self._watchers or watcher.told == status:
                watcher.is_sending, watcher.since = False, None
                return False
            watcher.told, watcher.since = status, time.monotonic()
            return True

    def _end(self, watcher: _Watcher) -> None:
        with self._lock:
            self._watchers.discard(watcher)
        watcher.send(None)
