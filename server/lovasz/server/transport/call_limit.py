"""A limit of calls at a time."""

from __future__ import annotations

import threading


class CallLimit:
    """So many calls may go on at a time. Nobody waits here: a call goes on or is refused."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._calls = 0

    def take(self) -> bool:
        """Lets a call go on, until :meth:`give_back`; False: as many do as may."""
        with self._lock:
            if self._calls >= self._most:
                return False
            self._calls += 1
            return True

    def give_back(self) -> None:
        """A call has ended.

        Raises:
            ValueError: more calls have ended than went on.
        """
        with self._lock:
            if not self._calls:
                raise ValueError("a call has ended twice")
            self._calls -= 1
