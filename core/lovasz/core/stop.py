"""Ends a computation early, from another thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

_NO_TASK_IS_LEFT = 1 << 62


class Stopped(Exception):
    """The computation was asked to end early; its results are undefined."""


class Stop:
    """Asks a computation to end; compiled loops on the CPU notice it when they claim their next task."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked = False
        self._running: npt.NDArray[np.int64] | None = None

    def ask(self) -> None:
        """Ends the running loop after its current tasks, and keeps further ones from starting."""
        with self._lock:
            self._asked = True
            if self._running is not None:
                self._running[0] = _NO_TASK_IS_LEFT

    @contextmanager
    def watching(self, tasks: npt.NDArray[np.int64]) -> Iterator[None]:
        """Lets ``ask`` end a loop that claims its tasks from this counter, for the length of a ``with`` block.

        Raises:
            Stopped: the computation has been asked to end.
        """
        with self._lock:
            if self._asked:
                raise Stopped
            self._running = tasks
        try:
            yield
        finally:
            with self._lock:
                self._running = None
        if self._asked:
            raise Stopped
