"""The live display: the progress of the current combination, on stderr."""

from __future__ import annotations

import os
from typing import TextIO

from lovasz.client.bench.measurement import Phase, Progress
from lovasz.client.bench.text import milliseconds_text, workload_text
from lovasz.client.bench.workload import Workload

_DEFAULT_COLUMNS = 80
"""The width of a terminal that does not report one."""


class Live:
    """On a terminal, one line that is rewritten as the load runs; elsewhere, one line for each combination."""

    def __init__(self, combinations: int, stream: TextIO) -> None:
        self._combinations = combinations
        self._stream = stream
        self._terminal = stream.isatty()
        self._number = 0
        self._name = ""

    def begin(self, workload: Workload) -> None:
        """Starts the next combination."""
        self._number += 1
        self._name = workload_text(workload)
        if not self._terminal:
            print(f"{self._number}/{self._combinations} {self._name}", file=self._stream, flush=True)

    def update(self, progress: Progress) -> None:
        """Rewrites the line."""
        if not self._terminal:
            return
        line = f"{self._number}/{self._combinations} {progress.phase.value}"
        if progress.phase is not Phase.FIRST:
            line += f" {progress.elapsed_seconds:.1f} s, {progress.requests} requests"
            line += f", {progress.requests_per_second:.1f}/s, p50 {milliseconds_text(progress.p50_seconds)} ms"
        if progress.errors:
            line += f", {progress.errors} errors"
        line += f"  ({self._name})"
        # A line longer than the terminal could not be rewritten.
        self._stream.write(f"\r{line[: self._columns() - 1]}\x1b[K")
        self._stream.flush()

    def clear(self) -> None:
        """Removes the line."""
        if self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or _DEFAULT_COLUMNS
        except OSError:
            return _DEFAULT_COLUMNS
