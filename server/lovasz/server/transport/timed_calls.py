"""Calls that may last only so long, and of which there may be only so many: those whose header has not come yet."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import grpc

from lovasz.server.errors import AbandonedError, NoRequestsLeftError, ServerError, StalledError, fresh
from lovasz.server.observe.logs import Sparingly
from lovasz.server.observe.metrics import Metrics, Phase
from lovasz.server.transport.messages import has_left
from lovasz.server.transport.status import status_of
from lovasz.wire import UNIX

CONNECTION_CALLS = 32
"""Calls of one connection that may be open for longer than a moment. Unix sockets do not tell connections apart."""
_MOMENT_SECONDS = 0.25
"""A call that is open for longer may be cut off for one that has just come: a header follows its call at once."""
_RETRY_SECONDS = 0.3

MessageT = TypeVar("MessageT")


class Limit(NamedTuple):
    """How long a call may be open.

    Attributes:
        what: what has to come in this time.
        option: what sets it; empty: no option does.
    """

    what: str
    seconds: float
    option: str = ""


@dataclass(eq=False)
class OpenCall:
    """A call that is open: a ``with`` closes it.

    Attributes:
        since: when it was opened (``time.monotonic``).
        error: what it was cut off with, as its time was up, or another call needed its place; None: it was not.
    """

    calls: TimedCalls
    peer: str
    context: grpc.ServicerContext
    limit: Limit
    since: float
    error: ServerError | None = None

    def __enter__(self) -> OpenCall:
        return self

    def read(self, read: Callable[[], MessageT]) -> MessageT:
        """Reads from the caller.

        Raises:
            ServerError: the call was cut off meanwhile; or what ``read`` raises.
        """
        try:
            return read()
        except AbandonedError:
            if self.error is None:
                raise
        raise fresh(self.error)

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
            seconds: how long each may be open, unless :meth:`open` is told another limit.
            most: how many may be open at a time.
            option: what sets ``seconds``; empty: no option does.
        """
        self._what, self._most, self._metrics = what, most, metrics
        self._limit = Limit("header", seconds, option)
        self._lock = threading.Lock()
        self._open: dict[OpenCall, None] = {}
        """The longest first."""
        self._of_connection: dict[str, dict[OpenCall, None]] = {}
        self._log = Sparingly(logging.getLogger(__name__))

    def first(
        self, messages: Iterator[MessageT], context: grpc.ServicerContext, limit: Limit | None = None
    ) -> MessageT | None:
        """The first message of a call; None if the caller sends none.

        Raises:
            NoRequestsLeftError: too many calls wait for theirs.
            StalledError: it did not come in time. The call is cut off.
            AbandonedError: the caller went away.
        """
        with self.open(context, limit) as call:
            return call.read(partial(_first, messages, context))

    def open(self, context: grpc.ServicerContext, limit: Limit | None = None) -> OpenCall:
        """Counts a call as open, until the end of a ``with``.

        Args:
            limit: how long it may be; None: as long as most.

        Raises:
            NoRequestsLeftError: too many are.
        """
        call = OpenCall(self, context.peer(), context, limit or self._limit, time.monotonic())
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
            raise self._too_many()
        if oldest is not None:
            self._cut_off(oldest, self._too_many())
        return call

    def check(self) -> None:
        """A chore: cuts off the calls whose time is up."""
        now = time.monotonic()
        with self._lock:
            late = [call for call in self._open if call.since + call.limit.seconds < now]
        for call in late:
            self._cut_off(call, StalledError.of(*call.limit))

    def _too_many(self) -> NoRequestsLeftError:
        return NoRequestsLeftError(f"too many {self._what} at a time", _RETRY_SECONDS)

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

    def _cut_off(self, call: OpenCall, error: ServerError) -> None:
        error.was_sent = True
        with self._lock:
            if call not in self._open:
                return
            del self._open[call]
            call.error = error
        self._metrics.stalled.labels(Phase.RECEIVE.value).inc()
        self._log.warning(f"cut off one of the {self._what}", peer=call.peer)
        _end(call.context, error)


def _first(messages: Iterator[MessageT], context: grpc.ServicerContext) -> MessageT | None:
    try:
        message = next(messages, None)
    except grpc.RpcError as error:
        error.__traceback__ = None  # gRPC keeps it with the call: a cycle.
        raise AbandonedError from None
    if message is None and has_left(context):
        raise AbandonedError
    return message


def _end(context: Any, error: ServerError) -> None:
    """Ends a call from outside its thread, which waits in gRPC."""
    try:
        # Not a part of gRPC's interface, which has ``cancel`` alone: that tells the caller no reason.
        context._rpc_event.call.cancel(status_of(error).code.value[0], str(error))
    except Exception:
        context.cancel()
