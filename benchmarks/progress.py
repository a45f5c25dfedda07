"""Progress of a benchmark on the standard error, apart from its results on the standard output."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

SECONDS_BETWEEN_LINES = 2.0

Progress = Callable[[str], None]
"""Called with what is being done."""


class ProgressLine:
    """Shows what is being done: on one line of a terminal, else in a line every few seconds."""

    def __init__(self) -> None:
        self.prefix = ""
        self._start = time.monotonic()
        self._in_place = sys.stderr.isatty()
        self._last = -SECONDS_BETWEEN_LINES

    def __call__(self, text: str) -> None:
        elapsed = time.monotonic() - self._start
        line = f"{int(elapsed) // 60:3d}:{int(elapsed) % 60:02d}  {self.prefix}{text}"
        if self._in_place:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        elif elapsed - self._last >= SECONDS_BETWEEN_LINES:
            self._last = elapsed
            print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._in_place:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def after(progress: Progress, prefix: str) -> Progress:
    """The same, with a prefix to each text."""
    return lambda text: progress(f"{prefix}, {text}")
