"""A job: what the batcher queues and the engine computes, and the callers who each wait for a part of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeAlias

import torch

from lovasz.core.batch import Request
from lovasz.server.errors import AbandonedError, ExpiredError, fresh
from lovasz.server.memory.any_staging import AnyStaging
from lovasz.spec import Layout, Result, WeightedSum

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


@dataclass(eq=False)
class Caller:
    """One call that waits for the answer to its request.

    Attributes:
        deadline: when the caller stops waiting (``time.monotonic``); None: never.
        staging: where the tensors are, and where the gradient goes; None: anywhere.
        started: when the batch with the request was started (``time.monotonic``); None before.
        rank: of a joint step; 0 without one.
        tenant: whom the request belongs to.
        left: set once the caller has gone away.
    """

    request: Request
    deadline: float | None = None
    staging: AnyStaging | None = None
    started: float | None = None
    rank: int = 0
    tenant: Tenant = NOBODY
    left: threading.Event = field(default_factory=threading.Event)
    _future: Future[Answer] = field(default_factory=Future)

    @property
    def answered(self) -> bool:
        """Whether there is an answer or an error, or the request was cancelled."""
        return self._future.done()

    def answer(self, answer: Answer) -> None:
        """Answers, unless the caller was refused before."""
        with suppress(InvalidStateError):
            self._future.set_result(answer)

    def refuse(self, error: Exception) -> None:
        """Answers with an error, unless the caller was answered before."""
        with suppress(InvalidStateError):
            self._future.set_exception(error)

    def claim(self) -> bool:
        """From now on the request cannot be cancelled; False if it has been."""
        return self._future.set_running_or_notify_cancel()

    def cancel(self) -> None:
        """Ends the wait with CancelledError, unless the request was claimed or answered before."""
        self._future.cancel()

    def wait(self, timeout_seconds: float | None = None) -> Answer:
        """Waits for the answer.

        Raises:
            concurrent.futures.TimeoutError: there was no answer in time.
            CancelledError: the job was cancelled.
            Exception: what the caller was refused with; a copy, so that only this thread adds to its trace.
        """
        error = self._future.exception(timeout_seconds)
        if error is not None:
            raise fresh(error)
        return self._future.result()


def cost(loss: WeightedSum, layout: Layout) -> int:
    """What a request costs the device, in logits."""
    return layout.elements + _ELEMENTS_PER_SEGMENT * loss.segments(layout)


@dataclass(eq=False)
class Job:
    """Requests that are computed as one: a single request, or those of all ranks of a joint step, in rank order.

    Attributes:
        callers: who wait for it, one for each request.
        queued: since when it waits for the device (``time.monotonic``).
        when_left: called each time that a caller leaves. Set by the engine when it starts the job.
    """

    callers: tuple[Caller, ...]
    loss: WeightedSum
    want_grad: bool
    queued: float = field(default_factory=time.monotonic)
    when_left: Callable[[], None] | None = None

    @cached_property
    def elements(self) -> int:
        """Logits of all requests."""
        return sum(caller.request.layout.elements for caller in self.callers)

    @cached_property
    def cost(self) -> int:
        """What it costs the device, in logits."""
        return sum(cost(self.loss, caller.request.layout) for caller in self.callers)

    @property
    def due(self) -> float:
        """Its place in the queue, as a time.

        A job that costs N logits lets those pass that arrive within N times a constant after it. So large jobs do not
        hold up small ones, and do not wait forever.
        """
        return self.queued + _SECONDS_PER_ELEMENT * self.cost

    @property
    def tenant(self) -> Tenant:
        """Whom it belongs to: for a joint step, the tenant of its first rank."""
        return self.callers[0].tenant

    @cached_property
    def key(self) -> Key:
        """Jobs with equal keys can share a batch."""
        first = self.callers[0].request
        return self.loss, self.want_grad, first.logits.dtype, first.layout.channels

    def leave(self, caller: Caller) -> None:
        """A caller has gone away. Once all have, the job is cancelled, or ends early if it is being computed and
        nobody waits for the rest of its batch."""
        caller.left.set()
        if all(other.left.is_set() for other in self.callers):
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
        now = time.monotonic()
        if all(caller.deadline is not None and now > caller.deadline for caller in self.callers):
            self.refuse(ExpiredError("the deadline passed while the request was waiting for the device"))
            return False
        return True

    def refuse(self, error: Exception) -> None:
        """Answers all callers that have no answer yet with an error."""
        for caller in self.callers:
            caller.refuse(error)
