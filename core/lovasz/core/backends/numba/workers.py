"""Threads for compiled loops. The calling thread takes tasks, too, so it never waits for a busy pool."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from lovasz.core.stop import Stop


class Workers:
    """Runs a compiled loop in several threads: at most as many as torch uses (``torch.set_num_threads``)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._size = 0
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

        Args:
            threads: the number of threads including the calling one, at least 1.
            own: returns the arguments that only this thread gets.

        Raises:
            Stopped: the loop was asked to end early.
        """
        tasks = np.zeros(1, np.int64)
        if stop is not None:
            stop.watch(tasks)
        futures = []
        if threads > 1:
            pool = self._helpers(threads - 1)
            futures = [pool.submit(loop, tasks=tasks, **arguments, **own(thread)) for thread in range(1, threads)]
        try:
            loop(tasks=tasks, **arguments, **own(0))
        finally:
            for future in futures:
                if not future.cancel():  # A thread that has not started would find no task left.
                    future.result()
        if stop is not None:
            stop.check()

    def _helpers(self, size: int) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._size < size:
                self._pool, self._size = ThreadPoolExecutor(size, thread_name_prefix="lovasz-core"), size
            return self._pool

    def _forget(self) -> None:
        """Drops the pool in a forked process, in which its threads do not exist."""
        self._lock, self._pool = threading.Lock(), None


WORKERS = Workers()


def thread_count() -> int:
    return torch.get_num_threads()
