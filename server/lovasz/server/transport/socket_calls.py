"""The calls that come over the shared-memory socket: what carries them, and the threads that serve them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import NoReturn

import grpc

from lovasz.server.observe.logs import Sparingly
from lovasz.server.observe.metrics import SHARED_MEMORY, Metrics
from lovasz.server.transport.call_limit import CallLimit
from lovasz.server.transport.carrier import Carrier
from lovasz.server.transport.lanes import Lanes, Place
from lovasz.server.transport.packet_threads import PacketThreads
from lovasz.server.transport.status import FAULT_TEXT, status_of
from lovasz.server.transport.threads import TOO_MANY_CALLS, too_many_calls
from lovasz.spec import InvalidInput
from lovasz.v1 import loss_pb2 as pb
from lovasz.wire import PUSHBACK_KEY

_log = logging.getLogger(__name__)

Compute = Callable[[pb.RequestHeader, Carrier], pb.ResponseHeader]
"""Computes a request, and writes its gradient to its region."""

LAST_ANSWERS_SECONDS = 1.0
"""How long answers may take to leave when the server stops."""


class _Aborted(Exception):
    """The call ends with an error."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(code, text)
        self.code, self.text = code, text


class SocketCall:
    """One call: a :class:`Carrier`.

    Attributes:
        due: its deadline (``time.monotonic``); None: none.
    """

    def __init__(self, calls: SessionCalls, message: pb.SharedMemoryCall) -> None:
        self._calls, self._message = calls, message
        metadata = message.metadata
        self._metadata = [(key, metadata[key]) for key in metadata]
        self.due: float | None = None
        if message.HasField("timeout_seconds"):
            seconds = message.timeout_seconds
            self.due = time.monotonic() + (seconds if seconds > 0 else 0.0)  # NaN counts as 0.
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] | None = []
        """None once it has ended."""
        self._is_heard = True
        """Whether its caller waits for an answer."""
        self._retry_after: str | None = None

    def serve(self, compute: Compute) -> Callable[[], None]:
        """Computes it; returns what sends the answer, if its caller waits for one."""
        header: pb.ResponseHeader | None = None
        failure: pb.CallError | None = None
        try:
            header = compute(self._message.header, self)
        except _Aborted as error:
            retry_after = None if self._retry_after is None else int(self._retry_after)
            failure = pb.CallError(code=error.code.name, text=error.text, retry_after_milliseconds=retry_after)
        except Exception:  # Outside the service, which ends its own faults with an error.
            _log.exception("a fault of a call over the shared-memory socket")
            failure = pb.CallError(code=grpc.StatusCode.INTERNAL.name, text=FAULT_TEXT)
        answer = pb.SharedMemoryAnswer(number=self._message.number, header=header, error=failure)
        return partial(self._calls.end, answer, is_heard=self._is_heard)

    def peer(self) -> str:
        return self._calls.peer

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]:
        return self._metadata

    def time_remaining(self) -> float | None:
        return None if self.due is None else self.due - time.monotonic()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        with self._lock:
            if self._callbacks is None:
                return False
            self._callbacks.append(callback)
            return True

    def is_active(self) -> bool:
        return self._callbacks is not None

    def cancel(self) -> None:
        with self._lock:
            callbacks, self._callbacks = self._callbacks, None
        for callback in callbacks or ():
            callback()

    def abandon(self) -> None:
        """Its caller does not wait any more."""
        self._is_heard = False
        self.cancel()

    def set_trailing_metadata(self, trailing_metadata: tuple[tuple[str, str], ...]) -> None:
        self._retry_after = dict(trailing_metadata).get(PUSHBACK_KEY)

    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        raise _Aborted(code, details)


class SessionCalls:
    """The calls in flight of one connection.

    Attributes:
        peer: the process at its other end.
    """

    def __init__(self, threads: SocketThreads, peer: str, send: Callable[[pb.SharedMemoryReply], None]) -> None:
        """None yet.

        Args:
            send: sends a packet to the caller, at once or never.
        """
        self.peer = peer
        self._threads, self._send = threads, send
        self._lock = threading.Lock()
        self._open: dict[int, SocketCall] = {}
        self._leaving = 0
        """Answers that are being sent."""

    def __len__(self) -> int:
        with self._lock:
            return len(self._open) + self._leaving

    def begin(self, message: pb.SharedMemoryCall) -> SocketCall | None:
        """A call that came; :meth:`SocketThreads.serve` has to serve it. None: it was refused."""
        number = message.number
        call = SocketCall(self, message)
        with self._lock:
            is_in_flight = number in self._open
            goes_on = not is_in_flight and self._threads.limit.take()
            if goes_on:
                self._open[number] = call
        if goes_on:
            return call
        if is_in_flight:
            text = f"got {number}, which is in flight; expected another number"
            self._refuse(number, InvalidInput("call.number", text))
        else:
            self._threads.log.warning(TOO_MANY_CALLS, peer=self.peer)
            refusal = too_many_calls()
            self._refuse(number, refusal, refusal.retry_after_milliseconds)
        return None

    def _refuse(self, number: int, error: Exception, retry_after_milliseconds: int | None = None) -> None:
        status = status_of(error)
        assert status.rejection is not None
        self._threads.metrics.count_unread(SHARED_MEMORY, status.code.name, status.rejection)
        failure = pb.CallError(
            code=status.code.name, text=str(error), retry_after_milliseconds=retry_after_milliseconds
        )
        self._send(pb.SharedMemoryReply(answer=pb.SharedMemoryAnswer(number=number, error=failure)))

    def cancel(self, number: int) -> None:
        """Its caller does not wait for this call any more."""
        with self._lock:
            call = self._open.get(number)
        if call is not None:
            call.abandon()

    def cancel_all(self) -> None:
        """The caller has gone."""
        for call in self._calls():
            call.abandon()

    def expire(self, now: float) -> float | None:
        """Ends the calls whose deadline has passed; returns the next deadline, None if there is none."""
        due = [(call.due, call) for call in self._calls() if call.due is not None]
        for when, call in due:
            if when <= now:
                call.cancel()
        return min((when for when, _ in due if when > now), default=None)

    def end(self, answer: pb.SharedMemoryAnswer, *, is_heard: bool) -> None:
        """A call is done."""
        with self._lock:
            del self._open[answer.number]  # Before its caller has the answer, and may use the number again.
            self._leaving += 1
        if is_heard:
            self._send(pb.SharedMemoryReply(answer=answer))
        with self._lock:
            self._leaving -= 1

    def _calls(self) -> list[SocketCall]:
        with self._lock:
            return list(self._open.values())


class SocketThreads:
    """Threads for the packets of all sockets, beside those of gRPC: a flood here leaves gRPC its own.

    A thread that reads a call serves it. There is one more than there may be calls, so that one always reads.

    Attributes:
        limit: of calls at a time, of one connection or of all.
        log, metrics: for refusals.
        packets: what the threads wait for.
    """

    def __init__(self, most: int, compute: Compute, lanes: Lanes, metrics: Metrics) -> None:
        self.log, self.metrics = Sparingly(_log), metrics
        self.packets = PacketThreads(most + 1, "socket-call")
        self.limit = CallLimit(most)
        self._compute, self._lanes = compute, lanes

    def start_all(self) -> None:
        """Starts all threads.

        Raises:
            RuntimeError: the system refuses one.
        """
        self.packets.start_all()

    def serve(self, call: SocketCall) -> None:
        """Serves a call in this thread; the limit has let it go on."""
        with self._lanes.waited(Place(call.peer())):
            answer = call.serve(self._compute)
        self.limit.give_back()  # Before its caller has the answer, and may ask again.
        answer()

    def stop(self, *, wait: bool) -> None:
        """Ends the threads; waits for them unless some may be stuck."""
        self.packets.stop(wait=wait)
