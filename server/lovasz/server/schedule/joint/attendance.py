"""Which ranks have come to a run, and which have left it; forgotten once all have left, or nobody has come for long.

Nothing here takes a lock: ``JointTable`` does.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from lovasz import wire
from lovasz.server.schedule.joint.group import Step

RUN_SECONDS = 3600.0
"""How long a run is remembered after a rank came to it or left it."""
MAX_ENTRIES = 200_000
"""Ranks that are remembered over all runs, and rounds that they have left; the runs that were used last stay."""


@dataclass
class _Run:
    """What is remembered of a run.

    Attributes:
        processes: the process of each rank that came and said it.
        evaluated: ranks that came to a step without a gradient.
        left: by round and rank: the first steps with and without a gradient that the rank takes no part in.
        since: when it was first heard of (``time.monotonic``).
        used: when a rank came or left.
        counted: its entries, as far as they were counted for :data:`MAX_ENTRIES`.
    """

    world_size: int
    processes: dict[int, bytes] = field(default_factory=dict)
    evaluated: set[int] = field(default_factory=set)
    left: dict[int, dict[int, tuple[int, int]]] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)
    used: float = 0.0
    counted: int = 0

    @property
    def entries(self) -> int:
        return len(self.processes) + len(self.evaluated) + sum(map(len, self.left.values()))


class Attendance:
    """The runs that are remembered, by name."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._entries = 0

    def __len__(self) -> int:
        return len(self._runs)

    def come(self, joint: wire.Joint, want_grad: bool) -> bool:
        """A rank comes to a step; if it had left this round, it is back.

        Returns:
            Whether its training was restarted since it came or left last: no rank counts as having left then.
        """
        run, is_restarted = self._run_of(joint)
        left = run.left.get(joint.round)
        if left is not None:
            left.pop(joint.rank, None)
        if not want_grad:
            run.evaluated.add(joint.rank)
        self._count(run)
        return is_restarted

    def leave(self, joint: wire.Joint, evaluation_step: int) -> None:
        """A rank takes no part in the steps of its round from these on: ``joint.step`` is the one with a gradient."""
        run, _ = self._run_of(joint)
        left = run.left.setdefault(joint.round, {})
        left[joint.rank] = joint.step, evaluation_step
        if len(left) == run.world_size:
            del run.left[joint.round]
        if run.left:
            self._count(run)
        else:
            self._forget(joint.run)

    def absent(self, step: Step, world_size: int) -> set[int]:
        """The ranks that have left before a step."""
        run = self._runs.get(step.run)
        if run is None or run.world_size != world_size:
            return set()
        left = run.left.get(step.round, {})
        return {rank for rank, first in left.items() if step.number >= first[0 if step.want_grad else 1]}

    def never_evaluated(self, run: str, ranks: Iterable[int]) -> list[int]:
        """Those of the ranks that have come to no step without a gradient."""
        known = self._runs.get(run)
        return [rank for rank in ranks if known is None or rank not in known.evaluated]

    def since(self, run: str) -> float:
        """When a run was first heard of, or was restarted (``time.monotonic``)."""
        known = self._runs.get(run)
        return math.inf if known is None else known.since

    def forget_old(self) -> None:
        """Forgets runs that nobody has come to for long."""
        until = time.monotonic() - RUN_SECONDS
        for name in [name for name, run in self._runs.items() if run.used < until]:
            self._forget(name)

    def _run_of(self, joint: wire.Joint) -> tuple[_Run, bool]:
        """The run of a rank, now used, and whether it is a restarted one."""
        run = self._runs.get(joint.run)
        process = None if run is None else run.processes.get(joint.rank)
        is_restarted = run is not None and (
            run.world_size != joint.world_size or bool(process and joint.process and process != joint.process)
        )
        if is_restarted:
            self._forget(joint.run)
        run = self._runs.setdefault(joint.run, _Run(joint.world_size))
        self._runs.move_to_end(joint.run)
        run.used = time.monotonic()
        if joint.process:
            run.processes.setdefault(joint.rank, joint.process)
        return run, is_restarted

    def _count(self, run: _Run) -> None:
        """Counts the entries of a run, which may have changed, and forgets runs if there are too many."""
        self._entries += run.entries - run.counted
        run.counted = run.entries
        while self._entries > MAX_ENTRIES:
            self._forget(next(iter(self._runs)))

    def _forget(self, name: str) -> None:
        self._entries -= self._runs.pop(name).counted
