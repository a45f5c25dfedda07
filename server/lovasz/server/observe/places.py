"""Who is shown in the metrics, where not all can be: those who are active keep their places."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

KEPT_SECONDS = 60.0
"""A name that has been silent for this long loses its place, if a new name needs one."""

ShownT = TypeVar("ShownT")


@dataclass
class _Place(Generic[ShownT]):
    shown: ShownT
    heard: float


class Places(Generic[ShownT]):
    """At most ``most`` names have a place, with what is shown of them, and keep it while they are active.

    A new name gets a free place. If there is none, it gets that of the name that has been silent longest, once that has
    been silent for ``KEPT_SECONDS``. Until then it has no place. Not thread-safe: the owner holds a lock.
    """

    def __init__(self, most: int, begin: Callable[[], ShownT]) -> None:
        """Starts with all places free.

        Args:
            begin: returns what is shown of a name that has just got a place.
        """
        self._most, self._begin = most, begin
        self._places: OrderedDict[str, _Place[ShownT]] = OrderedDict()
        """The name that has been silent longest is the first."""

    def hear(self, name: str) -> ShownT | None:
        """Notes that a name is active, and returns what is shown of it; None if it has no place."""
        now = time.monotonic()
        place = self._places.get(name)
        if place is None:
            if len(self._places) >= self._most:
                silent_longest = next(iter(self._places))
                if now - self._places[silent_longest].heard < KEPT_SECONDS:
                    return None
                del self._places[silent_longest]
            place = self._places[name] = _Place(self._begin(), now)
        place.heard = now
        self._places.move_to_end(name)
        return place.shown

    def items(self) -> Iterator[tuple[str, ShownT]]:
        """Yields the names that have a place, and what is shown of them."""
        return ((name, place.shown) for name, place in self._places.items())
