"""The groups that wait for ranks, and how they end. Nothing here takes a lock: ``JointTable`` does."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from lovasz.server.errors import JointBrokenError, ServerError
from lovasz.server.observe.logs import Sparingly
from lovasz.server.observe.metrics import JointOutcome, Metrics
from lovasz.server.schedule.job import Job
from lovasz.server.schedule.joint import texts
from lovasz.server.schedule.joint.attendance import Attendance
from lovasz.server.schedule.joint.group import STRAGGLER_SECONDS, Group, Step
from lovasz.server.schedule.joint.out_of_step import out_of_step
from lovasz.server.schedule.joint.regrouping import Regrouping

_log = logging.getLogger(__name__)

_MOST_LINES = 10
"""The most lines of the log within a second: callers can break steps as fast as they ask."""


class WaitingGroups:
    """The groups that wait, by step."""

    def __init__(self, metrics: Metrics, regrouping: Regrouping, ended: Callable[[], None]) -> None:
        """None waits yet.

        Args:
            ended: called after each end that is no completion.
        """
        self._metrics, self._regrouping, self._ended = metrics, regrouping, ended
        self._log = Sparingly(_log, _MOST_LINES)
        self._groups: dict[Step, Group] = {}

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Group]:
        """All of them, also while some end."""
        return iter(list(self._groups.values()))

    def get(self, step: Step) -> Group | None:
        """The group of a step; None: none waits."""
        return self._groups.get(step)

    def add(self, group: Group) -> Group:
        """A group begins to wait."""
        self._groups[group.step] = group
        return group

    def complete(self, group: Group, last_rank: int) -> Job:
        """All ranks of a group are here: returns what is to be queued."""
        del self._groups[group.step]
        self._count(group, JointOutcome.COMPLETED)
        if time.monotonic() - group.since > STRAGGLER_SECONDS:
            self._log.info("a joint step waited", **_fields(group), last_rank=last_rank)
        return group.complete()

    def refuse(self, group: Group, error: ServerError, outcome: JointOutcome) -> None:
        """Refuses all ranks of a group."""
        self._log.warning("a joint step is broken", **_fields(group), reason=str(error))
        group.refuse(error)
        self.end(group, outcome)

    def tell_of_abort(self, step: Step, rank: int, reason: str) -> None:
        """A rank cannot take part in a step for which nobody waits, or others wait for another attempt."""
        text = f"rank {rank}: {reason}"
        self._log.warning("a rank cannot take part in a joint step", run=step.run.name, step=step.number, reason=text)

    def check(self, timeout_seconds: float, attendance: Attendance) -> None:
        """Ends groups whose time is up, or whose ranks wait for each other or are to call again; logs which ranks the
        others wait for."""
        now = time.monotonic()
        for groups in out_of_step(self, attendance, now):
            text = texts.out_of_step(groups, attendance)
            for group in groups:
                self.refuse(group, JointBrokenError(text), JointOutcome.OUT_OF_STEP)
        for group in self:
            if now >= group.deadline:
                self.time_out(group, timeout_seconds, attendance)
        for group in self._regrouping.due(self, now):
            self.refuse(group, self._regrouping.error(group), JointOutcome.REGROUPED)
        for group in self:
            if group.begins_to_straggle(now):
                self._log.info("a joint step waits", **_fields(group), missing=texts.ranks(group.missing))

    def time_out(self, group: Group, timeout_seconds: float, attendance: Attendance) -> None:
        """Refuses all ranks of a group: others did not come in time."""
        text = texts.timed_out(group, timeout_seconds, self._groups.values(), attendance)
        self.refuse(group, JointBrokenError(text), JointOutcome.TIMEOUT)

    def end(self, group: Group, outcome: JointOutcome) -> None:
        """A group is gone, with the room for the ranks that did not come."""
        del self._groups[group.step]
        group.permit.release()
        self._count(group, outcome)
        self._ended()

    def _count(self, group: Group, outcome: JointOutcome) -> None:
        self._regrouping.ended(group, outcome)
        self._metrics.joint_groups.labels(outcome.value).inc()


def _fields(group: Group) -> dict[str, object]:
    """What the log says of a group."""
    waited = round(time.monotonic() - group.since, 1)
    return {"run": group.step.run.name, "step": group.step.number, "seconds": waited}
