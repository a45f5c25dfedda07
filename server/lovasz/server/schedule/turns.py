"""Turns: each tenant gets its share of a device while others want it, too.

Nothing here takes a lock: ``Batcher`` does.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from lovasz.server.schedule.contenders import Contenders
from lovasz.server.schedule.job import Job, Tenant

_ELEMENTS_PER_REQUEST = 100_000
"""How many logits take as long as what each request costs besides, however small it is."""


class Turn(NamedTuple):
    """A job that waits, and which turn it belongs to: earlier turns come first."""

    number: int
    job: Job


class Turns:
    """Counts what each tenant has had, in logits, and says whose jobs come next (start-time fair queueing).

    A tenant of weight 2 gets twice as much as one of weight 1: its logits count half.

    A tenant's jobs are in the order in which they are due. Each starts, in a time that is counted in logits, when the
    one before has ended, or now if the tenant has had nothing for long. A turn is a part of that time: in it, each
    tenant may have a job, or as many as fit.
    """

    def __init__(self, turn_elements: int, weight_of: Callable[[Tenant], float]) -> None:
        """Nobody has had anything.

        Args:
            turn_elements: the size of a turn. A turn is a batch, and the next one waits for it.
            weight_of: the weight of a tenant.
        """
        self._turn_elements = turn_elements
        self._weight_of = weight_of
        self._now = 0
        self._ends: dict[Tenant, int] = {}
        """When the last job of each tenant that was taken ends; of those for which that is later than now."""
        self._contenders = Contenders[Tenant]()

    def see(self, tenant: Tenant) -> None:
        """A tenant has sent a request."""
        self._contenders.see(tenant)

    @property
    def are_taken(self) -> bool:
        """Whether several tenants want the device."""
        return self._contenders.are_several

    def first(self, queues: Iterable[Sequence[Job]]) -> list[Turn]:
        """The jobs that wait, the next turn first; within a turn, in the order in which they are due.

        Args:
            queues: the jobs that wait, each list in the order in which they are due.
        """
        ends = dict(self._ends)
        turns = []
        for job in heapq.merge(*queues, key=lambda job: job.due):
            start = max(self._now, ends.get(job.tenant, 0))
            ends[job.tenant] = start + self._cost(job)
            turns.append(Turn(start // self._turn_elements, job))
        return sorted(turns, key=lambda turn: turn.number)

    def take(self, jobs: Iterable[Job]) -> None:
        """These jobs are computed now."""
        now = self._now
        for job in jobs:
            start = max(self._now, self._ends.get(job.tenant, 0))
            self._ends[job.tenant] = start + self._cost(job)
            now = max(now, start)
        self._now = now
        self._ends = {tenant: end for tenant, end in self._ends.items() if end > now}

    def forget(self) -> None:
        """Nobody waits: what tenants have had counts no more."""
        self._ends.clear()

    def _cost(self, job: Job) -> int:
        return round((job.cost + _ELEMENTS_PER_REQUEST * len(job.callers)) / self._weight_of(job.tenant))
