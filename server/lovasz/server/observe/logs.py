"""Structured logs on standard error: one line for each event with its fields, as text or as JSON."""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import time
from collections import deque
from datetime import datetime, timezone

from lovasz.server.observe.log_writer import LogWriter

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _Formatter(logging.Formatter):
    def fields(self, record: logging.LogRecord) -> dict[str, object]:
        return {key: value for key, value in vars(record).items() if key not in _STANDARD}

    def time(self, record: logging.LogRecord) -> str:
        return datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")


class TextFormatter(_Formatter):
    """``2026-01-31T12:00:00.000+00:00 INFO ready listen=127.0.0.1:50051``"""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {key}={_quoted(value)}" for key, value in self.fields(record).items())
        line = f"{self.time(record)} {record.levelname} {_printable(record.getMessage())}{fields}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(_Formatter):
    """``{"time": ..., "level": "info", "logger": ..., "event": "ready", "listen": "127.0.0.1:50051"}``"""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": self.time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **self.fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class Sparingly:
    """Logs few events a second, each with the number of events since the last one that were not logged."""

    def __init__(self, logger: logging.Logger, most: int = 1) -> None:
        """Nothing was logged yet.

        Args:
            most: the most events that are logged within a second.
        """
        self._logger = logger
        self._lock = threading.Lock()
        self._last = deque([-math.inf] * most, most)
        """When the last events were logged (``time.monotonic``)."""
        self._unlogged = 0

    def info(self, event: str, **fields: object) -> None:
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._write(logging.WARNING, event, fields)

    def _write(self, level: int, event: str, fields: dict[str, object]) -> None:
        now = time.monotonic()
        with self._lock:
            if now - self._last[0] < 1.0:
                self._unlogged += 1
                return
            self._last.append(now)
            unlogged, self._unlogged = self._unlogged, 0
        self._logger.log(level, event, extra={**fields, "unlogged": unlogged})


def _quoted(value: object) -> str:
    text = str(value)
    is_plain = text.isprintable() and not any(c.isspace() or c in '"=' for c in text)
    return text if text and is_plain else json.dumps(text)


def _printable(text: str) -> str:
    """The text with control characters escaped, so that a caller's words cannot steer the reader's terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def configure(level: str, format: str) -> None:
    """Sends all logs of the process to standard error. Only for the entry point."""
    handler: logging.Handler
    try:
        handler = logging.NullHandler() if sys.stderr is None else LogWriter(sys.stderr)
    except RuntimeError:  # No more threads can start: the server will say so, and end.
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
