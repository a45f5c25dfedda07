"""Ends a computation early, from another thread."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_NO_TASK_IS_LEFT = 1 << 62


class Stopped(Exception):
    """The computation was asked to end early; its results are undefined."""


class Stop:
    """Asks a computation to end; compiled loops on the CPU notice it when they claim their next task.

    It needs no lock: ``ask`` writes ``asked`` and then reads which tasks are watched, and ``watch`` does the opposite.
    So at least one of the two sees the other.

    Attributes:
        asked: whether the computation has been asked to end.
    """

    def __init__(self) -> None:
        self.asked = False
        self._watched: npt.NDArray[np.int64] | None = None

    def ask(self) -> None:
        """Ends the running loop after its current tasks, and keeps further ones from starting."""
        self.asked = True
        watched = self._watched
        if watched is not None:  # If its loop has ended, nobody reads it any more.
            take_tasks_away(watched)

    def watch(self, tasks: npt.NDArray[np.int64]) -> None:
        """Lets ``ask`` end the next loop, which claims its tasks from this counter; the counter is for it alone.

        Raises:
            Stopped: the computation has been asked to end.
        """
        self._watched = tasks
        self.check()

    def check(self) -> None:
        """Called after a loop, whose results are undefined if it was ended.

        Raises:
            Stopped: the computation has been asked to end.
        """
        if self.asked:
            raise Stopped


def take_tasks_away(tasks: npt.NDArray[np.int64]) -> None:
    """Lets the loop that claims its tasks from this counter end after its current tasks."""
    tasks[0] = _NO_TASK_IS_LEFT
