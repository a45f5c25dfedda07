"""Room for a large request that small ones would starve: they take each part of it as soon as it is free."""

from __future__ import annotations

import math
import time

_AFTER_SECONDS = 3.0
"""How long a request has been refused, again and again, before bytes are kept for it."""
_MOST_SECONDS = 2.0
"""How long bytes are kept at most, unless the request was told to wait for longer: others are refused meanwhile."""
_SLACK_SECONDS = 1.0
"""How much later than twice the delay that it was told a request may come back."""
_PAUSE_SECONDS = 30.0
"""How long none are kept after it was in vain: what others hold for long is not free sooner."""


class Earmark:
    """Keeps bytes for one request at a time, which is known by its caller and its size.

    Takes no lock: who uses it does.
    """

    def __init__(self) -> None:
        """Nobody waits."""
        self._key: tuple[str, int] | None = None
        """Who waits, and for how many bytes."""
        self._since = self._due = self._last = math.inf
        """When it was first refused; by when it has to come back; when its bytes are free again (all
        ``time.monotonic``)."""
        self._is_kept = False
        self._paused_until = -math.inf

    def kept_from(self, who: str, nbytes: int) -> int:
        """How many bytes this request has to leave to the one that waits."""
        if self._key is None or not self._is_kept or self._key == (who, nbytes):
            return 0
        return self._key[1] if self._waits(time.monotonic()) else 0

    def refused(self, who: str, nbytes: int, delay_seconds: float) -> None:
        """There is no room for this request.

        Args:
            delay_seconds: after which it is told to come back.
        """
        now = time.monotonic()
        if not self._waits(now):
            self._key, self._since, self._last = (who, nbytes), now, math.inf
        if self._key != (who, nbytes):
            return
        comes_back = 2 * delay_seconds + _SLACK_SECONDS
        if not self._is_kept and now - self._since >= _AFTER_SECONDS and now >= self._paused_until:
            self._is_kept, self._last = True, now + max(_MOST_SECONDS, comes_back)
        self._due = min(now + comes_back, self._last)

    def admitted(self, who: str, nbytes: int) -> None:
        """There was room for this request."""
        if self._key == (who, nbytes):
            self._key, self._is_kept = None, False

    def _waits(self, now: float) -> bool:
        """Whether somebody waits; forgets one that has not come back."""
        if self._key is not None and now >= self._due:
            if self._is_kept:
                self._paused_until = now + _PAUSE_SECONDS
            self._key, self._is_kept = None, False
        return self._key is not None
