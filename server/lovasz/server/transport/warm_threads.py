"""Threads that are all there from the start, and that stay warm."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

Work: TypeAlias = Callable[[], object]

_Inbox: TypeAlias = "queue.SimpleQueue[Work | None]"


class WarmThreads:
    """So many threads. Work goes to the one that was busy last, whose memory the processor still knows.

    In a pool of the standard library threads take turns: with hundreds of them, each is cold when its turn comes.
    """

    def __init__(self, most: int, name: str) -> None:
        """Starts no thread yet."""
        self._most, self._name = most, name
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._inboxes: list[_Inbox] = []
        self._idle: list[_Inbox] = []
        """Those of the threads that have nothing to do."""
        self._waiting: deque[Work] = deque()

    def start_all(self) -> None:
        """Starts all threads.

        Raises:
            RuntimeError: the system refuses one.
        """
        for number in range(self._most):
            inbox: _Inbox = queue.SimpleQueue()
            thread = threading.Thread(target=self._run, args=(inbox,), name=f"{self._name}_{number}", daemon=True)
            thread.start()
            self._threads.append(thread)
            self._inboxes.append(inbox)
        self._idle += reversed(self._inboxes)

    @property
    def is_full(self) -> bool:
        """Whether no thread is free."""
        return not self._idle

    def put(self, work: Work) -> None:
        """Does the work in a thread, once one is free."""
        with self._lock:
            if not self._idle:
                self._waiting.append(work)
                return
            inbox = self._idle.pop()
        inbox.put(work)

    def stop(self, *, wait: bool) -> None:
        """Ends the threads, after their work; waits for them unless some may be stuck."""
        for inbox in self._inboxes:
            inbox.put(None)
        for thread in self._threads if wait else ():
            thread.join()

    def _run(self, inbox: _Inbox) -> None:
        work = inbox.get()
        while work is not None:
            work()
            with self._lock:
                following = self._waiting.popleft() if self._waiting else None
                if following is None:
                    self._idle.append(inbox)
            del work  # So that no tensors are held while waiting for more.
            work = inbox.get() if following is None else following
