"""Turns: each tenant gets its share of a device while others want it, too.

Nothing here takes a lock: ``Batcher`` does.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from lovasz.server.schedule.contenders import Contenders
from lovasz.server.schedule.job import Job, Tenant

_ELEMENTS_PER_REQUEST = 100_000
"""How many logits take as long as what each request costs besides, however small it is."""
_MOST_TURNS = 16
"""The most turns that share a batch."""


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
            turn_elements: the size of a turn. The next batch waits for the turns of the one before.
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

    def next(self, queues: Iterable[Sequence[Job]]) -> list[list[Job]]:
        """The jobs of the next turns that can share a batch: a list of each turn, in their order.

        These are the first turn, and the ones after it as long as all tenants that want the device have jobs there, and
        jobs of no other kind come first: so nobody has to wait for what only others have.

        Args:
            queues: the jobs that wait, each list in the order in which they are due; some wait.
        """
        ends, turns = dict(self._ends), defaultdict[int, list[Job]](list)
        for job in heapq.merge(*queues, key=lambda job: job.due):
            start = max(self._now, ends.get(job.tenant, 0))
            ends[job.tenant] = start + self._cost(job)
            turns[start // self._turn_elements].append(job)
        numbers = sorted(turns)
        first, key, last_of_tenants = numbers[0], turns[numbers[0]][0].key, dict[Tenant, int]()
        last = first + _MOST_TURNS - 1
        for number in numbers:
            for job in turns[number]:
                if job.key == key:
                    last_of_tenants[job.tenant] = number
                else:
                    last = min(last, number - 1)
        last = min(last, *last_of_tenants.values()) if self._contenders.are_all_in(last_of_tenants) else first
        shared = [first, *(number for number in numbers if first < number <= last)]
        return [[job for job in turns[number] if job.key == key] for number in shared]

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
