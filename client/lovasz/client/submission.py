"""Runs submitted calls in threads that do not keep the process alive."""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from lovasz.client.tensors import AnyArray
from lovasz.spec.arrays import is_torch

ResultT = TypeVar("ResultT")

_Work = tuple[Future[Any], Callable[[], Any], Callable[[], None]]
"""What to do, and what to do instead if that is cancelled before it begins."""


class CallThreads:
    """At most ``max_threads`` threads, started when they are needed.

    They are daemons, unlike those of a ThreadPoolExecutor, which an interpreter waits for when it ends: after Ctrl-C it
    would wait for the timeouts of all calls.
    """

    def __init__(self, max_threads: int) -> None:
        self._max_threads = max_threads
        self._closed = False
        self._begin()
        _ALL.add(self)

    def _begin(self) -> None:
        """Begins without threads: also in a forked process, in which those of its parent do not exist."""
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._closing: set[threading.Thread] = set()
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        # Ends the threads of a client that was dropped and not closed.
        weakref.finalize(self, self._queue.put, None).atexit = False

    def submit(self, work: Callable[[], ResultT], discard: Callable[[], None] = lambda: None) -> Future[ResultT]:
        """Runs the work in a thread.

        Args:
            discard: is called instead if the future was cancelled before.

        Raises:
            RuntimeError: :meth:`close` was called.
        """
        future: Future[ResultT] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("closed")
            self._queue.put((future, work, discard))
            if not self._idle.acquire(blocking=False) and len(self._threads) < self._max_threads:
                name = f"lovasz-submit_{len(self._threads)}"
                thread = threading.Thread(target=_run, args=(self._queue, self._idle), name=name, daemon=True)
                thread.start()
                self._threads.append(thread)
        return future

    def close(self, timeout_seconds: float | None = None) -> None:
        """Takes no more work, and waits until all of it is done, or until the time is up.

        Called by a future's callback, it does not wait for threads that are in such a call already, its own included.
        """
        with self._lock:
            self._closed = True
            self._closing.add(threading.current_thread())
            self._queue.put(None)
        until = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        for thread in self._threads:
            if thread not in self._closing:
                thread.join(None if until is None else max(0.0, until - time.monotonic()))


def on_current_stream(logits: AnyArray, work: Callable[[], ResultT]) -> Callable[[], ResultT]:
    """The work, for another thread: there, too, it uses the stream that is current here on the logits' GPU.

    The logits may still be computed on that stream, and the result is used on it.
    """
    if not is_torch(logits) or not logits.is_cuda:
        return work
    cuda: Any = sys.modules["torch"].cuda
    stream = cuda.current_stream(logits.device)

    def run() -> ResultT:
        with cuda.stream(stream):
            return work()

    return run


_ALL: weakref.WeakSet[CallThreads] = weakref.WeakSet()


def _begin_all() -> None:
    for threads in list(_ALL):
        threads._begin()


if hasattr(os, "register_at_fork"):  # Windows has no fork.
    os.register_at_fork(after_in_child=_begin_all)


def _run(queue: SimpleQueue[_Work | None], idle: threading.Semaphore) -> None:
    while True:
        item = queue.get()
        if item is None:
            queue.put(None)  # For the next thread.
            return
        future, work, discard = item
        if not future.set_running_or_notify_cancel():
            discard()
        else:
            try:
                result = work()
            except BaseException as error:
                future.set_exception(error)
                del error
            else:
                future.set_result(result)
                del result
        del item, future, work, discard  # So that no tensors are held while waiting for the next call.
        idle.release()
