"""Lanes: while several connections send requests, the interpreter works on equally many calls of each at a time.

One thread of a process runs Python at a time. Without lanes, a connection with many calls in flight has many threads
that wait for the interpreter, and a call of another connection waits for all of them at each step of its way.
"""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from lovasz.server.schedule.contenders import Contenders

_SEEN_SECONDS = 0.5
"""A connection that is the only one is looked at this often."""

_PEAK_SECONDS = 1.0
"""The most calls that a connection had at once count half each time that it has had fewer for so long."""

_MOST_SECONDS = 1.0
"""A call that has been worked on for longer gets no faster by being alone: others of its lane pass it."""


class _Order(enum.IntEnum):
    """Which calls of a lane go on first."""

    BEGUN = 0
    NEW = 1


@dataclass(eq=False)
class Place:
    """A call's place in the lane of its connection.

    Attributes:
        is_working: whether others of its lane wait for it.
        since: since when (``time.monotonic``).
    """

    connection: str
    is_working: bool = False
    since: float = 0.0


@dataclass(eq=False)
class _Lane:
    """Calls of a connection: those that others wait for, and those that wait, each with what lets it go on."""

    working: set[Place] = field(default_factory=set)
    waiting: tuple[deque[tuple[Place, Callable[[], object]]], ...] = field(
        default_factory=lambda: tuple(deque() for _ in _Order)
    )

    @property
    def is_empty(self) -> bool:
        return not self.working and not any(self.waiting)

    @property
    def calls(self) -> int:
        return len(self.working) + sum(map(len, self.waiting))


class _Peak(NamedTuple):
    """The most calls that a connection had at once.

    Attributes:
        since: when it had them (``time.monotonic``).
        weight: how much of the device it gets, compared with others.
    """

    calls: int
    since: float
    weight: float = 1.0

    def counts(self, now: float) -> int:
        """How many it counts for now."""
        return max(1, self.calls >> int((now - self.since) / _PEAK_SECONDS))


class Lanes:
    """Lets calls go on: at once, or, while several connections send requests, so many of each lane at a time.

    How many is the same for all: about as many as the connection with the fewest calls at once has. One that makes one
    call at a time has one call of each other connection beside its own. If all have nine, eight of each can share a
    batch. (It is one less than they have, since a call may come when the one before has its answer, but is not over.)

    The calls of a connection with a weight above 1 leave their lane. Beside it, the others have so many times fewer
    calls at a time.

    With one connection there are no lanes, and its calls take no lock here. A call leaves its lane while it waits for
    anything but the computation of small requests. So calls that wait for each other, as the ranks of a joint step do,
    never hold each other up.
    """

    def __init__(self) -> None:
        """No calls."""
        self._lock = threading.Lock()
        self._lanes: dict[str, _Lane] = {}
        self._contenders = Contenders[str]()
        self._peaks: dict[str, _Peak] = {}
        self._width = 1
        """How many calls of each lane go on at a time."""
        self._are_used = False
        self._last_seen, self._seen_until = "", 0.0
        self._here = threading.local()

    def begin(self, place: Place, start: Callable[[], object]) -> None:
        """A new call: has ``start`` called, now or when it is its turn, to serve the call in :meth:`served`."""
        if self._enter(place, _Order.NEW, start):
            start()

    def served(self, place: Place) -> AbstractContextManager[None]:
        """Serves a call that has begun in this thread; leaves the lane in the end."""
        return _Served(self, place)

    def waited(self, place: Place) -> AbstractContextManager[None]:
        """As :meth:`begin` and :meth:`served`: this thread waits until it is its turn."""
        self._wait(place, _Order.NEW)
        return _Served(self, place)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Others of the lane go on while the call that this thread serves waits for something."""
        place = self._place
        if place is None:
            yield
            return
        self._leave(place)
        try:
            yield
        finally:
            self._wait(place, _Order.BEGUN)

    def leave(self) -> None:
        """The call that this thread serves goes on beside others of its connection."""
        place = self._place
        if place is not None:
            self._leave(place)

    def see(self, weight: float = 1.0) -> None:
        """The call that this thread serves has a request to compute.

        Args:
            weight: of its connection.
        """
        place, now = self._place, time.monotonic()
        if place is None or (place.connection == self._last_seen and now < self._seen_until):
            return
        with self._lock:
            self._contenders.see(place.connection)
            peak = self._peaks.get(place.connection)
            if peak is None:
                self._peaks[place.connection] = _Peak(1, now, weight)
                self._width = 1
            elif peak.weight != weight:
                self._peaks[place.connection] = peak._replace(weight=weight)
                self._set_width()
            self._are_used = self._contenders.are_several
            self._last_seen, self._seen_until = place.connection, now + _SEEN_SECONDS

    def check(self) -> None:
        """A chore: lets others pass a call that is worked on for long; all go on if only one connection is left."""
        until, following = time.monotonic() - _MOST_SECONDS, list[Callable[[], object]]()
        with self._lock:
            self._are_used = self._contenders.are_several
            self._peaks = {who: peak for who, peak in self._peaks.items() if who in self._contenders}
            self._set_width()
            for lane in self._lanes.values():
                following += self._following(lane)
            working = [place for lane in self._lanes.values() for place in lane.working]
        for go_on in following:
            go_on()
        for place in working:
            if place.since < until or not self._are_used:
                self._leave(place)

    def _serve(self, place: Place) -> None:
        self._here.place = place

    def _end(self, place: Place) -> None:
        self._here.place = None
        self._leave(place)

    @property
    def _place(self) -> Place | None:
        return getattr(self._here, "place", None)

    def _wait(self, place: Place, order: _Order) -> None:
        if not self._are_used:
            return
        turn = threading.Lock()
        turn.acquire()
        if not self._enter(place, order, turn.release):
            turn.acquire()

    def _enter(self, place: Place, order: _Order, go_on: Callable[[], object]) -> bool:
        """Whether a call can go on at once; else ``go_on`` is called when it can."""
        if not self._are_used:
            return True
        with self._lock:
            lane = self._lanes.get(place.connection)
            if lane is None:
                lane = self._lanes[place.connection] = _Lane()
            self._see_peak(place.connection, lane.calls + 1)
            if len(lane.working) < self._width and not any(lane.waiting):
                self._work(lane, place)
                return True
            lane.waiting[order].append((place, go_on))
            following = self._following(lane)  # The lanes may be wider now.
        for other_goes_on in following:
            other_goes_on()
        return False

    def _leave(self, place: Place) -> None:
        if not place.is_working:
            return
        with self._lock:
            if not place.is_working:  # Another thread was faster: it passed this call.
                return
            place.is_working = False
            lane = self._lanes[place.connection]
            lane.working.remove(place)
            following = self._following(lane)
            if lane.is_empty:
                del self._lanes[place.connection]
        for go_on in following:
            go_on()

    def _following(self, lane: _Lane) -> list[Callable[[], object]]:
        """What to call so that those that can go on now do."""
        following = []
        while any(lane.waiting) and (len(lane.working) < self._width or not self._are_used):
            other, go_on = next(filter(None, lane.waiting)).popleft()
            self._work(lane, other)
            following.append(go_on)
        return following

    def _see_peak(self, connection: str, calls: int) -> None:
        """A connection has so many calls now."""
        peak, now = self._peaks.get(connection), time.monotonic()
        if peak is None or calls < peak.counts(now):  # None: it has had nothing to compute lately.
            return
        self._peaks[connection] = _Peak(calls, now, peak.weight)
        if calls != peak.calls:
            self._set_width()

    def _set_width(self) -> None:
        now, peaks = time.monotonic(), self._peaks.values()
        fewest = min((peak.counts(now) for peak in peaks), default=1)
        self._width = max(1, int((fewest - 1) / max((1.0, *(peak.weight for peak in peaks)))))

    @staticmethod
    def _work(lane: _Lane, place: Place) -> None:
        place.is_working, place.since = True, time.monotonic()
        lane.working.add(place)


class _Served:
    """The ``with`` of a call that a thread serves. A generator would take three times as many steps, at each call."""

    __slots__ = ("_lanes", "_place")

    def __init__(self, lanes: Lanes, place: Place) -> None:
        self._lanes, self._place = lanes, place

    def __enter__(self) -> None:
        self._lanes._serve(self._place)

    def __exit__(self, *_: object) -> None:
        self._lanes._end(self._place)
