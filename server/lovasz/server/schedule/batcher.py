"""Groups waiting jobs into batches by cost and delay; does not compute them."""

from __future__ import annotations

import threading
import time
from bisect import insort
from collections.abc import Sequence

from lovasz.server.errors import StoppingError
from lovasz.server.schedule.job import Job, Key


class Batcher:
    """The queue in front of a device."""

    def __init__(self, max_elements: int, max_requests: int, max_delay_seconds: float) -> None:
        self._max_elements = max_elements
        self._max_requests = max_requests
        self._max_delay_seconds = max_delay_seconds
        self._waiting: dict[Key, list[Job]] = {}
        """Jobs with equal keys, in the order in which they are due."""
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        """Jobs that wait."""
        with self._changed:
            return sum(map(len, self._waiting.values()))

    def put(self, job: Job) -> None:
        """Queues a job.

        Raises:
            StoppingError: the queue is closed.
        """
        with self._changed:
            if self._closed:
                raise StoppingError("the server is stopping and takes no new requests")
            insort(self._waiting.setdefault(job.key, []), job, key=lambda j: j.due)
            self._changed.notify()

    def discard(self, job: Job) -> None:
        """Takes a cancelled job, and the tensors that it holds, out of the queue if it is still there."""
        with self._changed:
            jobs = self._waiting.get(job.key)
            if jobs is not None and job in jobs:
                jobs.remove(job)
                if not jobs:
                    del self._waiting[job.key]

    def close(self) -> None:
        """Takes no more jobs; those that wait can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def finished(self) -> bool:
        """Closed and empty."""
        with self._changed:
            return self._closed and not self._waiting

    def take(self, *, idle: bool, timeout_seconds: float) -> list[Job]:
        """Returns the next batch: the jobs that can share one with the job that is due first.

        Args:
            idle: True: the device has nothing to do; waits for a job, then takes at once all that are here. False:
                takes only a batch that is full or has been open for the delay, and does not wait.
            timeout_seconds: how long to wait for a job.

        Returns:
            Claimed jobs; an empty list if there is no batch.
        """
        with self._changed:
            if idle:
                self._changed.wait_for(lambda: self._waiting or self._closed, timeout_seconds)
            if not self._waiting:
                return []
            key = min(self._waiting, key=lambda k: self._waiting[k][0].due)
            if not idle and not self._is_ready(self._waiting[key]):
                return []
            return self._cut(key)

    def _is_ready(self, jobs: list[Job]) -> bool:
        open_since = min(job.queued for job in jobs)
        if time.monotonic() - open_since >= self._max_delay_seconds or _requests(jobs) >= self._max_requests:
            return True
        return sum(job.cost for job in jobs) >= self._max_elements

    def _cut(self, key: Key) -> list[Job]:
        jobs, batch, cost, taken = self._waiting[key], list[Job](), 0, 0
        for job in jobs:
            if batch and _requests([*batch, job]) > self._max_requests:
                break
            if batch and cost + job.cost > self._max_elements:
                break
            taken += 1
            if job.claim():
                batch.append(job)
                cost += job.cost
        del jobs[:taken]
        if not jobs:
            del self._waiting[key]
        return batch


def _requests(jobs: Sequence[Job]) -> int:
    return sum(len(job.callers) for job in jobs)
