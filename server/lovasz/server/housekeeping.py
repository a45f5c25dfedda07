"""Runs chores every second, in a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

Chore: TypeAlias = Callable[[], None]

_log = logging.getLogger(__name__)

INTERVAL_SECONDS = 1.0
_PATIENCE_SECONDS = 5.0
"""How long to wait for the thread to end: a chore may hang. The thread is a daemon."""


class Housekeeper:
    """Calls its chores one after the other. One that fails is logged, and called again the next time."""

    def __init__(self, name: str, chores: Sequence[Chore]) -> None:
        self._chores = chores
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_PATIENCE_SECONDS)

    def _run(self) -> None:
        while not self._stopping.wait(INTERVAL_SECONDS):
            for chore in self._chores:
                try:
                    chore()
                except Exception:
                    _log.exception("a chore failed")
