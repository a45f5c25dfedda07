"""Watches answers on their way out, and cuts off callers that have stopped taking theirs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from lovasz.server.observe.metrics import Metrics


@dataclass(eq=False)
class _Answer:
    cut_off: Callable[[], object]
    since: float


class SendWatch:
    """gRPC lets an answer wait for its caller for as long as it takes; this does not."""

    def __init__(self, stall_seconds: float, metrics: Metrics) -> None:
        self._stall_seconds = stall_seconds
        self._metrics = metrics
        self._lock = threading.Lock()
        self._answers: set[_Answer] = set()

    def watched(self, messages: Iterable[memoryview], cut_off: Callable[[], object]) -> Iterator[memoryview]:
        """Passes the messages of an answer on; each has to be taken within the stall timeout.

        Args:
            cut_off: ends the call, from another thread.
        """
        answer = _Answer(cut_off, time.monotonic())
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
        """Cuts off those that stall; to be called now and then."""
        until = time.monotonic() - self._stall_seconds
        with self._lock:
            stalled = [answer for answer in self._answers if answer.since < until]
            self._answers.difference_update(stalled)
        for answer in stalled:
            self._metrics.stalled.labels("send").inc()
            answer.cut_off()
