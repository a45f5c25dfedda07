"""With several servers: when ranks that wait are asked to call again, as the others may have reached another server.

Which server a run belongs to changes when one starts or ends, and ranks learn it at different times. Ranks that call
again all reach the same one. Nothing here takes a lock: ``JointTable`` does.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from lovasz.server.errors import RegroupError
from lovasz.server.observe.metrics import JointOutcome
from lovasz.server.schedule.joint import texts
from lovasz.server.schedule.joint.group import Group, SeatState, Step


@dataclass
class _Wait:
    """A step whose ranks were asked to call again.

    Attributes:
        since: when the first rank came (``time.monotonic``).
        asked: how many times its ranks were asked.
    """

    since: float
    asked: int = 0


class Regrouping:
    """The steps whose ranks were asked to call again.

    Each further time comes after twice the time of the one before: a rank sends its payload again. A step still ends at
    its timeout, counted from when its first rank came first.
    """

    def __init__(self, first_seconds: float, timeout_seconds: float) -> None:
        """No step waits yet.

        Args:
            first_seconds: how long a step waits before its ranks are asked for the first time; 0: never.
            timeout_seconds: after this, a step is no longer remembered.
        """
        self._first_seconds, self._timeout_seconds = first_seconds, timeout_seconds
        self._waits: dict[Step, _Wait] = {}

    def since(self, step: Step) -> float:
        """When the first rank of a step came that a group is made for now."""
        wait = self._waits.get(step)
        return time.monotonic() if wait is None else wait.since

    def due(self, waiting: Iterable[Group], now: float) -> list[Group]:
        """The groups whose ranks are to be asked now. Forgets the steps whose ranks have gone to another server."""
        for step in [step for step, wait in self._waits.items() if now - wait.since > self._timeout_seconds]:
            del self._waits[step]
        return [group for group in waiting if self._first_seconds and self._is_due(group, now)]

    def _is_due(self, group: Group, now: float) -> bool:
        """Not while a payload is on its way: it would be lost."""
        if any(seat.state is not SeatState.ARRIVED for seat in group.seats.values()):
            return False
        wait = self._waits.get(group.step)
        asked = 0 if wait is None else wait.asked
        return now - group.since >= self._first_seconds * ((2 << asked) - 1)

    def error(self, group: Group) -> RegroupError:
        """What the ranks of a group are told."""
        return RegroupError(f"call again, as {texts.missing_ranks(group)}: other ranks may have reached another server")

    def ended(self, group: Group, outcome: JointOutcome) -> None:
        """A group that waited has ended."""
        if outcome is JointOutcome.REGROUPED:
            self._waits.setdefault(group.step, _Wait(group.since)).asked += 1
        else:
            self._waits.pop(group.step, None)
