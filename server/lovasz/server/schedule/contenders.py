"""Who wants the same thing as others: those that have sent a request lately."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Container
from typing import Generic, TypeVar

CONTENDED_SECONDS = 5.0
"""A caller counts as one of several for this time after its last request: a trainer is away for a step meanwhile."""

_FORGOTTEN_AT_ONCE = 2
"""More than come at a time."""

WhoT = TypeVar("WhoT")


class Contenders(Generic[WhoT]):
    """Remembers who has sent a request within the last seconds. Takes no lock: who uses it does."""

    def __init__(self) -> None:
        """Nobody has."""
        self._seen: OrderedDict[WhoT, float] = OrderedDict()
        """When each sent its last request (``time.monotonic``); the longest ago first."""

    def see(self, who: WhoT) -> None:
        """Somebody has sent a request."""
        self._seen[who] = now = time.monotonic()
        self._seen.move_to_end(who)
        self._forget(now, most=_FORGOTTEN_AT_ONCE)  # Nobody may ask whether there are several.

    def __contains__(self, who: WhoT) -> bool:
        """Whether this one has, as far as was noticed (:attr:`are_several`)."""
        return who in self._seen

    def are_all_in(self, some: Container[WhoT]) -> bool:
        """Whether all that have, as far as was noticed (:attr:`are_several`), are among some."""
        return all(who in some for who in self._seen)

    @property
    def are_several(self) -> bool:
        """Whether there is more than one."""
        self._forget(time.monotonic(), most=len(self._seen))
        return len(self._seen) > 1

    def _forget(self, now: float, most: int) -> None:
        """Forgets so many of those whose last request is long ago."""
        for _ in range(most):
            if next(iter(self._seen.values())) >= now - CONTENDED_SECONDS:
                break
            self._seen.popitem(last=False)
