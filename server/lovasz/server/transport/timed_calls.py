"""Calls that may last only so long, and of which there may be only so many: those whose header has not come yet."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import grpc

from lovasz.server.errors import AbandonedError, NoRequestsLeftError, StalledError
from lovasz.server.observe.logs import Sparingly
from lovasz.server.observe.metrics import Metrics, Phase
from lovasz.server.transport.messages import has_left
from lovasz.wire import UNIX

CONNECTION_CALLS = 32
"""Calls of one connection that may be open for longer than a moment. Unix sockets do not tell connections apart."""
_MOMENT_SECONDS = 0.25
"""A call that is open for longer may be cut off for one that has just come: a header follows its call at once."""
_RETRY_SECONDS = 0.3

MessageT = TypeVar("MessageT")


@dataclass(eq=False)
class OpenCall:
    """A call that is open: a ``with`` closes it.

    Attributes:
        since: when it was opened (``time.monotonic``).
        is_cut_off: whether its time was up, or another call needed its place.
    """

    calls: TimedCalls
    peer: str
    cut_off: Callable[[], object]
    since: float
    is_cut_off: bool = False

    def __enter__(self) -> OpenCall:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.calls._close(self)


class TimedCalls:
    """Limits how many calls are open at a time, how many of them are of one connection, and how long each is open.

    If there are too many, the oldest makes room for one that has just come.
    """

    def __init__(self, what: str, seconds: float, most: int, metrics: Metrics, option: str = "") -> None:
        """No call is open yet.

        Args:
            what: what the log and errors call them.
            seconds: how long each may be open.
            most: how many may be open at a time.
            option: what sets ``seconds``; empty: no option does.
        """
        self._what, self._seconds, self._most, self._metrics = what, seconds, most, metrics
        self._option = option
        self._lock = threading.Lock()
        self._open: dict[OpenCall, None] = {}
        """The longest first."""
        self._of_connection: dict[str, dict[OpenCall, None]] = {}
        self._log = Sparingly(logging.getLogger(__name__))

    def first(self, messages: Iterator[MessageT], context: grpc.ServicerContext) -> MessageT | None:
        """The first message of a call; None if the caller sends none.

        Raises:
            NoRequestsLeftError: too many calls wait for theirs.
            StalledError: it did not come in time. The call is cut off.
            AbandonedError: the caller went away.
        """
        with self.open(context) as call:
            try:
                message = next(messages, None)
            except grpc.RpcError as error:
                error.__traceback__ = None  # gRPC keeps it with the call: a cycle.
                if not call.is_cut_off:
                    raise AbandonedError from None
                message = None
            if message is None and call.is_cut_off:
                raise StalledError.of_header(self._seconds, self._option)
            if message is None and has_left(context):
                raise AbandonedError
            return message

    def open(self, context: grpc.ServicerContext) -> OpenCall:
        """Counts a call as open, until the end of a ``with``.

        Raises:
            NoRequestsLeftError: too many are.
        """
        call = OpenCall(self, context.peer(), context.cancel, time.monotonic())
        with self._lock:
            oldest = self._oldest(self._open, self._most)
            own = self._of_connection.get(call.peer, {})
            own_oldest = None if call.peer.startswith(UNIX) else self._oldest(own, CONNECTION_CALLS)
            has_place = oldest is None or call.since - oldest.since > _MOMENT_SECONDS
            has_place &= own_oldest is None or call.since - own_oldest.since < _MOMENT_SECONDS
            if has_place:
                self._open[call] = own[call] = None
                self._of_connection[call.peer] = own
        if not has_place:
            self._log.warning(f"too many {self._what}", peer=call.peer)
            raise NoRequestsLeftError(f"too many {self._what} at a time", _RETRY_SECONDS)
        if oldest is not None:
            self._cut_off(oldest)
        return call

    def check(self) -> None:
        """A chore: cuts off the calls whose time is up."""
        until = time.monotonic() - self._seconds
        with self._lock:
            late = [call for call in self._open if call.since < until]
        for call in late:
            self._cut_off(call)

    @staticmethod
    def _oldest(calls: dict[OpenCall, None], most: int) -> OpenCall | None:
        """The oldest of the calls if there are as many as may be."""
        return next(iter(calls)) if len(calls) >= most else None

    def _close(self, call: OpenCall) -> None:
        with self._lock:
            self._open.pop(call, None)
            own = self._of_connection[call.peer]
            del own[call]
            if not own:
                del self._of_connection[call.peer]

    def _cut_off(self, call: OpenCall) -> None:
        with self._lock:
            if call not in self._open:
                return
            del self._open[call]
            call.is_cut_off = True
        self._metrics.stalled.labels(Phase.RECEIVE.value).inc()
        self._log.warning(f"cut off one of the {self._what}", peer=call.peer)
        call.cut_off()
