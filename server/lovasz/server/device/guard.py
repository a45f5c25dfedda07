"""Watches a device that does not answer: what waits for it is refused, and after a while the server gives up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from lovasz.server.device.engine import Engine
from lovasz.server.housekeeping import INTERVAL_SECONDS
from lovasz.server.schedule.admission import Admission

_log = logging.getLogger(__name__)

_MOST_SECONDS = 2 * INTERVAL_SECONDS
"""What counts between two looks at most: a process that was stopped for a while is no stuck device."""


class DeviceGuard:
    """Looks every second whether the device is stuck, or fails its check."""

    def __init__(
        self, engine: Engine, admission: Admission, stall_seconds: float, fail: Callable[[str], object]
    ) -> None:
        """Has not looked yet.

        Args:
            stall_seconds: how long one batch, or a check, may take; and how long the device may be unable to answer
                then, before ``fail`` is called with the reason.
        """
        self._engine, self._admission, self._stall_seconds, self._fail = engine, admission, stall_seconds, fail
        self._last_look = time.monotonic()
        self._since: float | None = None
        self._busy_seconds = self._failing_seconds = 0.0

    def check(self) -> None:
        """A chore."""
        now = time.monotonic()
        passed = min(now - self._last_look, _MOST_SECONDS)
        self._last_look = now
        since = self._engine.busy_since
        self._busy_seconds = self._busy_seconds + passed if since is not None and since == self._since else 0.0
        self._since = since
        is_stuck = self._busy_seconds >= self._stall_seconds
        self._admission.failing = is_failing = is_stuck or not (self._engine.passed_check or self._engine.starting)
        if is_stuck:
            refused = self._engine.give_up()
            if refused:
                _log.error("the device is stuck; its requests are refused", extra={"requests": refused})
        self._failing_seconds = self._failing_seconds + passed if is_failing else 0.0
        if self._failing_seconds >= self._stall_seconds:
            self._fail(f"{self._engine.device} has not answered for long (--device-stall)")
