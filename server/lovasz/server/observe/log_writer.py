"""Writes the lines of the log in a thread of its own: a standard error that nobody reads holds up nothing else."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from queue import SimpleQueue
from typing import TextIO

MOST_LINES = 1000
"""Lines that may wait to be written; more are left out."""
_FLUSH_SECONDS = 1.0
"""How long the process waits at its end for lines that are not written yet."""


class LogWriter(logging.Handler):
    """Never waits for the stream, except in :meth:`flush`."""

    def __init__(self, stream: TextIO, most_lines: int = MOST_LINES) -> None:
        """Starts the thread.

        Raises:
            RuntimeError: the system refuses it.
        """
        super().__init__()
        self._stream, self._most_lines = stream, most_lines
        # A signal's handler may log, and flush, in the middle of another ``put``: this queue's may be interrupted.
        self._lines: SimpleQueue[str | threading.Event] = SimpleQueue()
        self._left_out = 0
        threading.Thread(target=self._write_all, name="log-writer", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        if self._lines.qsize() >= self._most_lines:
            self._left_out += 1
            return
        try:
            if self._left_out:
                left_out, self._left_out = self._left_out, 0
                self._lines.put(self.format(_left_out(record, left_out)))
            self._lines.put(self.format(record))
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Waits until all lines are written, for a second at most."""
        written = threading.Event()
        self._lines.put(written)
        written.wait(_FLUSH_SECONDS)

    def _write_all(self) -> None:
        while True:
            line = self._lines.get()
            if isinstance(line, threading.Event):
                line.set()
                continue
            with suppress(OSError, ValueError):  # Its reader has gone, its disk is full, or it is closed.
                self._stream.write(f"{line}\n")
                self._stream.flush()


def _left_out(record: logging.LogRecord, lines: int) -> logging.LogRecord:
    """Says how many lines were left out before this record."""
    fields = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING", "created": record.created}
    text = "lines of the log were left out: standard error does not take them"
    return logging.makeLogRecord({**fields, "msg": text, "lines": lines})
