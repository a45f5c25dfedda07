"""Threads that wait for sockets together: the one that the kernel wakes for a packet works on it, and waits again."""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable
from typing import TypeAlias

_log = logging.getLogger(__name__)

Handler: TypeAlias = Callable[[], object]
"""Works on a socket that is readable. It is not called again until :meth:`PacketThreads.again`."""

_ONCE = select.EPOLLIN | select.EPOLLONESHOT


class PacketThreads:
    """Threads that share one epoll. No packet is handed from one thread to another.

    The kernel wakes the thread that began to wait last, whose memory the processor still knows.
    """

    def __init__(self, count: int, name: str) -> None:
        """Starts no thread yet."""
        self._handlers: dict[int, Handler] = {}
        self._epoll = select.epoll()
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._epoll.register(self._end, select.EPOLLIN)
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}_{number}", daemon=True) for number in range(count)
        ]

    def start_all(self) -> None:
        """Starts all threads.

        Raises:
            RuntimeError: the system refuses one.
        """
        for thread in self._threads:
            thread.start()

    def add(self, descriptor: int, handler: Handler) -> None:
        """Waits for a socket from now on."""
        self._handlers[descriptor] = handler
        self._epoll.register(descriptor, _ONCE)

    def again(self, descriptor: int) -> None:
        """Waits again for a socket whose handler was called."""
        self._epoll.modify(descriptor, _ONCE)

    def remove(self, descriptor: int) -> None:
        """Waits for a socket no more; comes before it is closed."""
        self._epoll.unregister(descriptor)
        self._handlers.pop(descriptor, None)

    def stop(self, *, wait: bool) -> None:
        """Ends the threads, after their work; waits for them unless some may be stuck."""
        os.eventfd_write(self._end, 1)
        for thread in self._threads if wait else ():
            if thread.ident is not None:
                thread.join()
        if wait:
            self._epoll.close()
            os.close(self._end)

    def _run(self) -> None:
        while True:
            for descriptor, _ in self._epoll.poll(maxevents=1):
                if descriptor == self._end:
                    return
                self._work(descriptor)

    def _work(self, descriptor: int) -> None:
        handler = self._handlers.get(descriptor)
        if handler is None:  # It was removed meanwhile.
            return
        try:
            handler()
        except Exception:
            _log.exception("a fault of a socket's handler")
