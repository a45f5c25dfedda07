"""Groups waiting requests into batches by cost and delay; does not compute them."""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from lovasz.core.batch import Request
from lovasz.server.errors import AbandonedError, ExpiredError, StoppingError, fresh
from lovasz.server.memory.staging import Staging
from lovasz.spec import Result, WeightedSum

_SECONDS_PER_ELEMENT = 5e-9
"""About what a CPU takes for a logit; for the order of the queue alone."""


@dataclass(frozen=True)
class Answer:
    """What the engine makes of a request.

    Attributes:
        result: with ``grad`` on the host, in the logits' dtype and contiguous, times ``grad_scale``.
        started: when its batch was started (``time.monotonic``).
        compute_seconds: from there until the batch was computed.
        copy_seconds: from there until its gradients were at their places on the host.
    """

    result: Result[torch.Tensor]
    grad_scale: float
    started: float
    compute_seconds: float
    copy_seconds: float
    batch_requests: int


Key: TypeAlias = tuple[WeightedSum, bool, torch.dtype, int]


@dataclass(eq=False)
class Entry:
    """One request on its way through the queue.

    Attributes:
        deadline: when its caller stops waiting (``time.monotonic``); None: never.
        staging: where its tensors lie on the host, and where its gradient is to be put; None: anywhere.
        started: when its batch was (``time.monotonic``); None before.
        future: receives the answer.
        left: its caller has gone.
        when_left: called then.
        joined: all entries that are computed as one with it, itself among them; empty if it is computed alone.
    """

    request: Request
    loss: WeightedSum
    want_grad: bool
    deadline: float | None
    staging: Staging | None = None
    future: Future[Answer] = field(default_factory=Future)
    queued: float = field(default_factory=time.monotonic)
    started: float | None = None
    left: bool = False
    when_left: Callable[[], None] | None = None
    joined: tuple[Entry, ...] = ()

    @property
    def members(self) -> tuple[Entry, ...]:
        """The entries that are computed as one with it, in their order; only the first of them is queued."""
        return self.joined or (self,)

    @property
    def elements(self) -> int:
        """Logits of all members."""
        return sum(entry.request.layout.elements for entry in self.members)

    @property
    def due(self) -> float:
        """Its place in the queue: a request of N logits steps back behind those that come within N times a constant
        after it, so that large ones do not hold up small ones, nor wait forever."""
        return self.queued + _SECONDS_PER_ELEMENT * self.elements

    @property
    def key(self) -> Key:
        """Requests with equal keys can share a batch."""
        return self.loss, self.want_grad, self.request.logits.dtype, self.request.layout.channels

    def cancel(self) -> None:
        """Gives it up. Once it is being computed, this ends early only if nobody waits for the rest of its batch."""
        if not self.joined and self.future.cancel():
            return
        self.left = True
        if all(entry.left for entry in self.joined):
            for entry in self.joined:
                entry.future.cancel()
        when_left = self.when_left
        if when_left is not None:
            when_left()

    def wait(self, timeout_seconds: float | None = None) -> Answer:
        """Waits for the answer.

        Raises:
            concurrent.futures.TimeoutError: it did not come in time.
            CancelledError: it was given up.
            Exception: a copy of what the future received, whose trace is this thread's alone.
        """
        error = self.future.exception(timeout_seconds)
        self.when_left = None  # It leads back here, and would keep the tensors alive.
        if error is not None:
            raise fresh(error)
        return self.future.result()

    def claim(self) -> bool:
        """Starts it, unless all its callers have gone or its deadline has passed."""
        running = [entry for entry in self.members if entry.future.set_running_or_notify_cancel()]
        if len(running) < len(self.members):
            for entry in running:  # All were being cancelled at this moment.
                entry.future.set_exception(AbandonedError("the caller went away"))
            return False
        if self.joined:  # A rank whose deadline has passed has left; the others wait on.
            return True
        if self.deadline is not None and time.monotonic() > self.deadline:
            self.future.set_exception(ExpiredError("the deadline passed while the request was waiting for the device"))
            return False
        return True


class Batcher:
    """The queue in front of a device."""

    def __init__(self, max_elements: int, max_requests: int, max_delay_seconds: float) -> None:
        self._max_elements = max_elements
        self._max_requests = max_requests
        self._max_delay_seconds = max_delay_seconds
        self._waiting: dict[Key, list[Entry]] = {}
        """Those with equal keys in the order in which they are due."""
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        """Requests waiting."""
        with self._changed:
            return sum(map(len, self._waiting.values()))

    def put(self, entry: Entry) -> None:
        """Queues a request.

        Raises:
            StoppingError: the queue is closed.
        """
        with self._changed:
            if self._closed:
                raise StoppingError("the server is stopping and takes no new requests")
            insort(self._waiting.setdefault(entry.key, []), entry, key=lambda e: e.due)
            self._changed.notify()

    def discard(self, entry: Entry) -> None:
        """Takes a cancelled entry, and the tensors that it holds, out of the queue if it is still there."""
        with self._changed:
            entries = self._waiting.get(entry.key)
            if entries is not None and entry in entries:
                entries.remove(entry)
                if not entries:
                    del self._waiting[entry.key]

    def close(self) -> None:
        """Takes no more; what waits can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def finished(self) -> bool:
        """Closed and empty."""
        with self._changed:
            return self._closed and not self._waiting

    def take(self, *, idle: bool, timeout_seconds: float) -> list[Entry]:
        """The next batch: of the requests that can share one, those whose first is due first.

        Args:
            idle: True: the device has nothing to do: waits for a request and takes what there is at once. False: takes
                only a batch that is full or has been open for the delay, and does not wait.
            timeout_seconds: how long to wait for a request.

        Returns:
            Claimed entries; none if there is no batch.
        """
        with self._changed:
            if idle:
                self._changed.wait_for(lambda: self._waiting or self._closed, timeout_seconds)
            if not self._waiting:
                return []
            key = min(self._waiting, key=lambda k: self._waiting[k][0].due)
            if not idle and not self._is_closed(self._waiting[key]):
                return []
            return self._cut(key)

    def _is_closed(self, entries: list[Entry]) -> bool:
        open_since = min(entry.queued for entry in entries)
        if time.monotonic() - open_since >= self._max_delay_seconds or len(entries) >= self._max_requests:
            return True
        return sum(entry.elements for entry in entries) >= self._max_elements

    def _cut(self, key: Key) -> list[Entry]:
        entries, batch, elements, taken = self._waiting[key], list[Entry](), 0, 0
        for entry in entries:
            if len(batch) == self._max_requests:
                break
            if batch and elements + entry.elements > self._max_elements:
                break
            taken += 1
            if entry.claim():
                batch.append(entry)
                elements += entry.elements
        del entries[:taken]
        if not entries:
            del self._waiting[key]
        return batch
