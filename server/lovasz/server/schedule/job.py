"""A job: what the batcher queues and the engine computes, and the callers who each wait for a part of it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeAlias

import torch

from lovasz.core.batch import Request
from lovasz.server.errors import AbandonedError, ExpiredError, fresh
from lovasz.server.memory.any_staging import AnyStaging
from lovasz.spec import Result, WeightedSum

_SECONDS_PER_ELEMENT = 5e-9
"""About what a CPU takes for one logit. Only the order of the queue depends on it."""
_ELEMENTS_PER_SEGMENT = 40
"""How many logits take as long as one segment, however few pixels it has."""


TOKEN, RUN, CONNECTION = "token", "run", "connection"
"""Kinds of tenants."""


class Tenant(NamedTuple):
    """Whom a request belongs to, in the shares of the device and of the room: a token's name, a run, or a connection.

    Attributes:
        kind: which of these.
        owner: tells runs of one name apart.
    """

    kind: str
    name: str
    owner: bytes = b""

    @property
    def label(self) -> str:
        """What metrics show: a connection counts for its host."""
        return f"host {self.name.rpartition(':')[0]}" if self.kind == CONNECTION else f"{self.kind} {self.name}"


NOBODY = Tenant(CONNECTION, "")

Key: TypeAlias = tuple[WeightedSum, bool, torch.dtype, int]


@dataclass(frozen=True)
class Answer:
    """What the engine returns for one request.

    Attributes:
        result: its ``grad`` is on the host (on the device if its caller shares memory there), contiguous, in the
            element type of the logits, and multiplied by ``grad_scale``.
        started: when the batch was started (``time.monotonic``).
        compute_seconds: from there until the batch was computed.
        copy_seconds: from there until the batch's gradients were where they are sent from.
        batch_requests: requests in the batch.
        ranks: callers of its job.
        is_first: whether it is the answer to the first of them.
    """

    result: Result[torch.Tensor]
    grad_scale: float
    started: float
    compute_seconds: float
    copy_seconds: float
    batch_requests: int
    ranks: int = 1
    is_first: bool = True


class Departure:
    """Whether a caller has gone away. Apart from the caller, so that whoever asks does not keep its tensors alive."""

    happened = False


@dataclass(eq=False)
class Caller:
    """One call that waits for the answer to its request.

    Attributes:
        cost: what the request costs the device, in logits.
        deadline: when the caller stops waiting (``time.monotonic``); None: never.
        staging: where the tensors are, and where the gradient goes; None: anywhere.
        started: when the batch with the request was started (``time.monotonic``); None before.
        rank: of a joint step; 0 without one.
        tenant: whom the request belongs to.
    """

    request: Request
    cost: int
    deadline: float | None = None
    staging: AnyStaging | None = None
    started: float | None = None
    rank: int = 0
    tenant: Tenant = NOBODY
    departure: Departure = field(default_factory=Departure)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_claimed: bool = False
    _outcome: Answer | Exception | None = None
    _gate: threading.Lock | None = None
    """Held until the outcome is here. There is none before the caller has to wait: often the answer is here by then."""

    @property
    def answered(self) -> bool:
        """Whether there is an answer or an error, or the request was cancelled."""
        return self._outcome is not None

    def answer(self, answer: Answer) -> None:
        """Answers, unless the caller was refused before."""
        self._end(answer)

    def refuse(self, error: Exception) -> None:
        """Answers with an error, unless the caller was answered before."""
        self._end(error)

    def claim(self) -> bool:
        """From now on the request cannot be cancelled; False if it has been."""
        with self._lock:
            self._is_claimed = self._outcome is None
            return self._is_claimed

    def cancel(self) -> None:
        """Ends the wait with CancelledError, unless the request was claimed or answered before."""
        self._end(CancelledError(), also_if_claimed=False)

    def _end(self, outcome: Answer | Exception, *, also_if_claimed: bool = True) -> None:
        with self._lock:
            if self._outcome is not None or (self._is_claimed and not also_if_claimed):
                return
            self._outcome = outcome
        if self._gate is not None:
            self._gate.release()

    def wait(self, timeout_seconds: float | None = None) -> Answer:
        """Waits for the answer, in one thread at a time.

        Raises:
            TimeoutError: there was no answer in time.
            CancelledError: the job was cancelled.
            Exception: what the caller was refused with; a copy, so that only this thread adds to its trace.
        """
        with self._lock:
            if self._gate is None and self._outcome is None:
                self._gate = threading.Lock()
                self._gate.acquire()
        if self._outcome is None:
            assert self._gate is not None
            if not self._gate.acquire(timeout=-1 if timeout_seconds is None else timeout_seconds):
                raise TimeoutError
        outcome = self._outcome
        assert outcome is not None
        if isinstance(outcome, Exception):
            raise fresh(outcome)
        return outcome


def cost_of(elements: int, segments: int) -> int:
    """What a request of this many logits and segments costs the device, in logits."""
    return elements + _ELEMENTS_PER_SEGMENT * segments


@dataclass(eq=False)
class Job:
    """Requests that are computed as one: a single request, or those of all ranks of a joint step, in rank order.

    Attributes:
        callers: who wait for it, one for each request.
        queued: since when it waits for the device (``time.monotonic``).
        when_left: called each time that a caller leaves. Set by the engine when it starts the job.
        tenant: whom it belongs to: for a joint step, the tenant of its first rank.
        elements: logits of all requests.
        cost: what it costs the device, in logits.
        deadline: when the last caller stops waiting (``time.monotonic``).
    """

    callers: tuple[Caller, ...]
    loss: WeightedSum
    want_grad: bool
    queued: float = field(default_factory=time.monotonic)
    when_left: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self.tenant = self.callers[0].tenant
        self.elements = self.cost = 0
        self.deadline = -math.inf
        for caller in self.callers:
            self.elements += caller.request.layout.elements
            self.cost += caller.cost
            self.deadline = max(self.deadline, math.inf if caller.deadline is None else caller.deadline)

    @property
    def due(self) -> float:
        """Its place in the queue, as a time.

        A job that costs N logits lets those pass that arrive within N times a constant after it. So large jobs do not
        hold up small ones, and do not wait forever.
        """
        return self.queued + _SECONDS_PER_ELEMENT * self.cost

    @cached_property
    def key(self) -> Key:
        """Jobs with equal keys can share a batch."""
        first = self.callers[0].request
        return self.loss, self.want_grad, first.logits.dtype, first.layout.channels

    def leave(self, caller: Caller) -> None:
        """A caller has gone away. Once all have, the job is cancelled, or ends early if it is being computed and
        nobody waits for the rest of its batch."""
        caller.departure.happened = True
        if all(other.departure.happened for other in self.callers):
            for other in self.callers:
                other.cancel()
        when_left = self.when_left
        if when_left is not None:
            when_left()

    def claim(self) -> bool:
        """Marks the job as started: callers cannot cancel it. False if all have left, or their deadlines have passed.

        If only some deadlines have passed, the other callers still need the job.
        """
        claimed = [caller for caller in self.callers if caller.claim()]
        if len(claimed) < len(self.callers):
            for caller in claimed:  # All callers are leaving at this moment.
                caller.refuse(AbandonedError())
            return False
        if time.monotonic() > self.deadline:
            self.refuse(ExpiredError("the deadline passed while the request was waiting for the device"))
            return False
        return True

    def refuse(self, error: Exception) -> None:
        """Answers all callers that have no answer yet with an error."""
        for caller in self.callers:
            caller.refuse(error)
