"""Watches answers while they are sent, and cuts off callers that stop reading theirs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from lovasz.server.observe.metrics import Metrics


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
        self._answers: set[_Sending] = set()

    def watched(self, messages: Iterable[memoryview], cut_off: Callable[[], object]) -> Iterator[memoryview]:
        """Passes on the messages of an answer. The caller has to take each within the stall timeout.

        Args:
            cut_off: ends the call, from another thread.
        """
        answer = _Sending(cut_off, time.monotonic())
        with self._lock:
            self._answers.add(answer)
        try:
            for message in messages:
                answer.since = time.monotonic()
                yield message
        finally:
            with self._lock:
                self._answers.discard(answer)

    def check(self) -> None:
        """A chore: cuts off the callers that have stalled."""
        until = time.monotonic() - self._stall_seconds
        with self._lock:
            stalled = [answer for answer in self._answers if answer.since < until]
            self._answers.difference_update(stalled)
        for answer in stalled:
            self._metrics.stalled.labels("send").inc()
            answer.cut_off()
