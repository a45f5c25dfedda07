"""Watches answers while they are sent, and cuts off callers that stop reading theirs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from lovasz.server.observe.metrics import Metrics, Phase
from lovasz.server.transport.carrier import Carrier

MessageT = TypeVar("MessageT")

MOST_UNSENT_BYTES = 64 << 20
"""Answers of one message that gRPC may hold beside the memory budget. Beyond that they keep what they have reserved."""
_LEAST_BYTES = 16 << 10
"""What gRPC takes about for an answer, however small."""


@dataclass(eq=False)
class _Sending:
    """An answer that is being sent; ``since`` is when its last message was taken."""

    cut_off: Callable[[], object]
    since: float


class SendWatch:
    """Limits how long an answer waits for its caller to read it. gRPC itself has no limit."""

    def __init__(self, stall_seconds: float, metrics: Metrics) -> None:
        self._stall_seconds = stall_seconds
        self._metrics = metrics
        self._lock = threading.Lock()
        self._has_none = threading.Condition(self._lock)
        self._is_awaited = False  # Most of the time nobody waits: no call should pay for telling nobody.
        self._answers: set[_Sending] = set()
        self._unsent_bytes = 0

    def watched(self, messages: Iterable[MessageT], context: Carrier) -> Iterator[MessageT]:
        """Passes on the messages of an answer. The caller has to take each within the stall timeout."""
        answer = self._begin(context)
        if not context.add_callback(partial(self._end, answer)):
            self._end(answer)
        for message in messages:
            answer.since = time.monotonic()
            yield message

    def hand_over(self, nbytes: int, context: Carrier, give_back: Callable[[], None]) -> None:
        """An answer of one message goes to gRPC, which takes it at once, and whose transport waits for its caller.

        Args:
            nbytes: its size.
            give_back: gives back what the call has reserved. Called at once if gRPC holds little, so that the caller
                does not see its answer before its room is free; else when the transport has let go of the answer.
        """
        nbytes = max(nbytes, _LEAST_BYTES)
        answer = self._begin(context, nbytes)
        is_much = self._unsent_bytes > MOST_UNSENT_BYTES

        def let_go() -> None:
            self._end(answer, nbytes)
            if is_much:
                give_back()

        if not context.add_callback(let_go):
            let_go()
        if not is_much:
            give_back()

    def wait_until_sent(self, timeout_seconds: float) -> int:
        """Waits until the transport has let go of all answers; returns of how many it has not in time."""
        with self._lock:
            self._is_awaited = True
            self._has_none.wait_for(lambda: not self._answers, timeout_seconds)
            return len(self._answers)

    def check(self) -> None:
        """A chore: cuts off the callers that have stalled."""
        until = time.monotonic() - self._stall_seconds
        with self._lock:
            stalled = [answer for answer in self._answers if answer.since < until]
            self._answers.difference_update(stalled)
            self._tell()
        for answer in stalled:
            self._metrics.stalled.labels(Phase.SEND.value).inc()
            answer.cut_off()

    def _begin(self, context: Carrier, nbytes: int = 0) -> _Sending:
        answer = _Sending(context.cancel, time.monotonic())
        with self._lock:
            self._answers.add(answer)
            self._unsent_bytes += nbytes
        return answer

    def _end(self, answer: _Sending, nbytes: int = 0) -> None:
        with self._lock:
            self._answers.discard(answer)
            self._unsent_bytes -= nbytes
            self._tell()

    def _tell(self) -> None:
        if self._is_awaited and not self._answers:
            self._has_none.notify_all()
