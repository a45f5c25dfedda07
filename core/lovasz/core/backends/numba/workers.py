"""Threads for compiled loops. The calling thread takes tasks, too, so it never waits for a busy helper.

Loops have addresses of tensors, so none may run on once its call has ended, also if the call is interrupted: a signal's
handler can raise an exception in the main thread at almost any point. Hence no executor, whose locks such an exception
can leave locked; and what ends a call can be repeated from its beginning. (Two signals at one moment, whose handlers
both raise, are more than this can take.)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from lovasz.core.stop import Stop, take_tasks_away


class _Job:
    """What one helper does for a call, unless the call ends before a helper takes it."""

    def __init__(self, loop: Callable[..., None], arguments: Mapping[str, Any]) -> None:
        self._work: tuple[Callable[..., None], Mapping[str, Any]] | None = (loop, arguments)
        self._owner: dict[str, str] = {}
        self._running = threading.Lock()
        self._running.acquire()
        self.error: BaseException | None = None

    def run(self) -> None:
        """Called by a helper."""
        if self._owner.setdefault("owner", "helper") != "helper":
            return
        assert self._work is not None
        loop, arguments = self._work
        try:
            loop(**arguments)
        except BaseException as error:
            self.error = error
        finally:
            self._running.release()

    def end(self) -> None:
        """Called by the call that waits: returns when no helper runs it, nor will. May be interrupted and repeated."""
        if self._owner.setdefault("owner", "call") == "helper":
            with self._running:
                pass
        self._work = None  # It may be in the queue for a while yet.


class Workers:
    """Runs a compiled loop in several threads: at most as many as torch uses (``torch.set_num_threads``)."""

    def __init__(self) -> None:
        self._forget()
        if hasattr(os, "register_at_fork"):  # Windows has no fork.
            os.register_at_fork(after_in_child=self._forget)

    def run(
        self,
        loop: Callable[..., None],
        threads: int,
        *,
        own: Callable[[int], dict[str, Any]] = lambda thread: {},
        stop: Stop | None = None,
        **arguments: Any,
    ) -> None:
        """Calls ``loop(tasks=..., **arguments, **own(thread))`` in each thread; returns when all tasks are done.

        Where no more threads can start, those that there are do all of it.

        Args:
            threads: the number of threads including the calling one, at least 1.
            own: returns the arguments that only this thread gets.

        Raises:
            Stopped: the loop was asked to end early.
        """
        tasks = np.zeros(1, np.int64)
        if stop is not None:
            stop.watch(tasks)
        jobs = []
        if threads > 1:
            helpers = min(threads - 1, self._start(threads - 1))
            jobs = [_Job(loop, dict(tasks=tasks, **arguments, **own(1 + helper))) for helper in range(helpers)]
        interrupted: BaseException | None = None
        try:
            for job in jobs:
                self._jobs.put(job)
            loop(tasks=tasks, **arguments, **own(0))
        except BaseException as error:
            interrupted = error
        left = True
        while left:
            try:
                if interrupted is not None:
                    take_tasks_away(tasks)
                for job in jobs:
                    job.end()
                left = False
            except BaseException as error:
                interrupted = interrupted or error
        failed = interrupted or next((job.error for job in jobs if job.error is not None), None)
        if failed is not None:
            for job in jobs:
                job.error = None
            try:
                raise failed
            finally:
                del failed, interrupted  # They hold this frame, and the tensors with it.
        if stop is not None:
            stop.check()

    def _start(self, count: int) -> int:
        """Starts helpers until there are so many; returns how many there are."""
        with self._lock:
            while self.size < count:
                helper = threading.Thread(target=_help, args=(self._jobs,), name="lovasz-core", daemon=True)
                try:
                    helper.start()
                except RuntimeError:  # The system has a limit, or the interpreter ends.
                    break
                self.size += 1
            return self.size

    def _forget(self) -> None:
        """Forgets the helpers: in a forked process their threads do not exist."""
        self._lock, self.size = threading.Lock(), 0
        self._jobs: SimpleQueue[_Job] = SimpleQueue()


def _help(jobs: SimpleQueue[_Job]) -> None:
    while True:
        job = jobs.get()
        job.run()
        del job  # While it waits for the next one, nothing is kept.


WORKERS = Workers()


def thread_count() -> int:
    return torch.get_num_threads()
