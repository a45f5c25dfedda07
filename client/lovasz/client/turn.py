"""What one thread at a time may do, also where an interrupt comes at any moment."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

ResultT = TypeVar("ResultT")


class Turn:
    """One thread at a time has it. Ctrl-C, or a signal handler that raises, never leaves it taken.

    Such an error can come between any two steps of Python: also after a lock was taken, and before a ``try`` whose
    ``finally`` releases it. An RLock knows whether this thread has it, so that it can be taken inside the ``try``.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def call(self, work: Callable[[], ResultT], timeout: float = 0.0) -> tuple[ResultT] | None:
        """Calls ``work`` when no other thread has the turn.

        Args:
            timeout: seconds to wait for it; 0: not at all.

        Returns:
            What ``work`` returned; None if another thread had the turn for all this time.
        """
        lock = self._lock
        try:
            if not (lock.acquire(timeout=timeout) if timeout > 0 else lock.acquire(blocking=False)):
                return None
            return (work(),)
        finally:
            # Nothing is called before this, as an interrupt could come there.
            try:  # noqa: SIM105
                lock.release()
            except RuntimeError:  # This thread has not got it.
                pass

    @property
    def is_free(self) -> bool:
        """Whether no other thread has it."""
        return self.call(_nothing) is not None


def _nothing() -> None:
    pass
