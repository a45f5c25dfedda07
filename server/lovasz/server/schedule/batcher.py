"""Groups waiting jobs into batches by cost, delay and turns; does not compute them."""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections.abc import Callable, Sequence

from lovasz.server.errors import StoppingError
from lovasz.server.schedule.job import Job, Key, Tenant
from lovasz.server.schedule.turns import Turns

TURN_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""The size of a turn on each type of device, in logits: about a millisecond."""


class Batcher:
    """The queue in front of a device."""

    def __init__(
        self,
        max_elements: int,
        max_requests: int,
        max_delay_seconds: float,
        turn_elements: int = TURN_ELEMENTS["cpu"],
        weight_of: Callable[[Tenant], float] = lambda tenant: 1.0,
    ) -> None:
        """Nothing waits.

        Args:
            max_elements: the most logits in a batch of more than one job.
            max_requests: the most requests in such a batch.
            max_delay_seconds: how long a batch stays open while the device is busy.
            turn_elements: about how many logits each tenant may have in a batch while others want the device.
            weight_of: how much of the device a tenant gets while others want it, compared with them.
        """
        self._max_elements = max_elements
        self._max_requests = max_requests
        self._max_delay_seconds = max_delay_seconds
        self._waiting: dict[Key, list[Job]] = {}
        """Jobs with equal keys, in the order in which they are due."""
        self.weight_of = weight_of
        self._turns = Turns(turn_elements, weight_of)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._closed = False

    def __len__(self) -> int:
        """Jobs that wait."""
        with self._lock:
            return sum(map(len, self._waiting.values()))

    @property
    def largest_cost(self) -> int:
        """Of the jobs that wait, what the largest costs the device, in logits."""
        with self._lock:
            return max((job.cost for jobs in self._waiting.values() for job in jobs), default=0)

    def put(self, job: Job) -> None:
        """Queues a job.

        Raises:
            StoppingError: the queue is closed.
        """
        with self._lock:
            self._see(job)
            insort(self._waiting.setdefault(job.key, []), job, key=lambda j: j.due)
            self._changed.notify()

    def pass_by(self, job: Job) -> bool:
        """Lets a job go to the idle device without being queued; False if other jobs wait.

        Raises:
            StoppingError: the queue is closed.
        """
        with self._lock:
            self._see(job)
            return not self._waiting

    def _see(self, job: Job) -> None:
        if self._closed:
            raise StoppingError()
        self._turns.see(job.tenant)

    def discard(self, job: Job) -> None:
        """Takes a cancelled job, and the tensors that it holds, out of the queue if it is still there."""
        with self._lock:
            jobs = self._waiting.get(job.key)
            if jobs is not None and job in jobs:
                jobs.remove(job)
                self._drop_empty(job.key)

    def take_all(self) -> list[Job]:
        """Takes out all jobs that wait, unclaimed."""
        with self._lock:
            jobs = [job for waiting in self._waiting.values() for job in waiting]
            self._waiting.clear()
            self._turns.forget()
            return jobs

    def close(self) -> None:
        """Takes no more jobs; those that wait can still be taken."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()

    @property
    def finished(self) -> bool:
        """Closed and empty."""
        with self._lock:
            return self._closed and not self._waiting

    def wait(self, timeout_seconds: float) -> None:
        """Waits until a job waits, or the queue is closed."""
        with self._lock:
            self._changed.wait_for(lambda: self._waiting or self._closed, timeout_seconds)

    def take(self, *, idle: bool) -> list[Job]:
        """Returns the next batch: the jobs that can share one with the job that is due first.

        If several tenants want the device, that is the first job of the next turn, and the batch has the jobs of that
        turn, and of those after it that all tenants have jobs in and that fit as a whole.

        Args:
            idle: True: the device has nothing to do; takes all that are here. False: takes only a batch that is full
                or has been open for the delay.

        Returns:
            Claimed jobs; an empty list if there is no batch.
        """
        with self._lock:
            if not self._waiting:
                return []
            jobs = self._next_jobs()
            if not idle and not self._is_ready(jobs):
                return []
            return self._cut(jobs)

    def _next_jobs(self) -> list[Job]:
        """Jobs of one key, in their order."""
        if not self._turns.are_taken:
            return min(self._waiting.values(), key=lambda jobs: jobs[0].due)
        jobs, *following = self._turns.next(self._waiting.values())
        for turn in following:
            if not self._fits([*jobs, *turn]):  # A part of it would have the jobs of those who have waited longest.
                break
            jobs += turn
        return jobs

    def _fits(self, jobs: list[Job]) -> bool:
        return _requests(jobs) <= self._max_requests and sum(job.cost for job in jobs) <= self._max_elements

    def _is_ready(self, jobs: list[Job]) -> bool:
        open_since = min(job.queued for job in jobs)
        if time.monotonic() - open_since >= self._max_delay_seconds or _requests(jobs) >= self._max_requests:
            return True
        return sum(job.cost for job in jobs) >= self._max_elements

    def _cut(self, jobs: Sequence[Job]) -> list[Job]:
        batch, cost, requests, taken = list[Job](), 0, 0, list[Job]()
        for job in jobs:
            if batch and requests + len(job.callers) > self._max_requests:
                break
            if batch and cost + job.cost > self._max_elements:
                break
            taken.append(job)
            if job.claim():
                batch.append(job)
                cost += job.cost
                requests += len(job.callers)
        key = jobs[0].key
        waiting = self._waiting[key]
        if taken == waiting[: len(taken)]:
            del waiting[: len(taken)]
        else:
            gone = set(taken)
            self._waiting[key] = [job for job in waiting if job not in gone]
        self._turns.take(batch)
        self._drop_empty(key)
        return batch

    def _drop_empty(self, key: Key) -> None:
        if not self._waiting[key]:
            del self._waiting[key]
        if not self._waiting:
            self._turns.forget()


def _requests(jobs: Sequence[Job]) -> int:
    return sum(len(job.callers) for job in jobs)
