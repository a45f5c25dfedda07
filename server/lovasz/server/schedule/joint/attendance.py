"""Which ranks have come to a run, from which processes, and which have left it; forgotten when nobody comes for long.

Nothing here takes a lock: ``JointTable`` does.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from lovasz import wire
from lovasz.server.errors import RunConflictError
from lovasz.server.schedule.joint.group import Run, Step

RUN_SECONDS = 3600.0
"""How long a run is remembered after a rank came to it or left it."""
MAX_ENTRIES = 200_000
"""Ranks that are remembered over all runs, and rounds that they have left; the runs that were used last stay."""
LIVE_SECONDS = 15.0
"""How long after a rank came, or waited, its run counts as one that others of the same name are in conflict with."""
_MOST_NAMED = 16
"""Runs of one name that are looked at, those that were heard of first."""
_RETURNS = 2
"""How often in a row a rank comes from the process that was replaced before: then two trainings take turns. Once may be
a late call of a process that was restarted."""


@dataclass
class _Process:
    """The process that a rank came from last, and the one before.

    Attributes:
        address: where it is; empty: unknown.
        former: the one before.
        returns: how often in a row the one before has come back.
    """

    name: bytes
    address: str
    former: bytes = b""
    former_address: str = ""
    returns: int = 0

    def followed_by(self, name: bytes, address: str) -> _Process:
        """The rank comes from another process, or from the same."""
        if name == self.name:
            return self
        return _Process(name, address, self.name, self.address, self.returns + 1 if name == self.former else 0)


class _Round(NamedTuple):
    """A round of a run. Steps of so many ranks have rounds of their own, as an evaluation on fewer ranks has."""

    world_size: int
    number: int

    @classmethod
    def of(cls, joint: wire.Joint) -> _Round:
        return cls(joint.world_size, joint.round)


@dataclass
class _Run:
    """What is remembered of a run.

    Attributes:
        processes: the process of each rank that came and said it.
        evaluated: ranks that came to a step without a gradient.
        last: the process that each rank came from last, also before the training was restarted.
        address: where a rank came from last; empty: unknown.
        left: by round and rank: the first steps with and without a gradient that the rank takes no part in.
        over: the round that all ranks have left last, as ``left``; a rank that has come again since is not in it.
        since: when it was first heard of (``time.monotonic``).
        used: when a rank came or left.
        waited: when ranks were last seen to wait.
        counted: its entries, as far as they were counted for :data:`MAX_ENTRIES`.
    """

    processes: dict[int, bytes] = field(default_factory=dict)
    evaluated: set[int] = field(default_factory=set)
    last: dict[int, _Process] = field(default_factory=dict)
    address: str = ""
    left: dict[_Round, dict[int, tuple[int, int]]] = field(default_factory=dict)
    over: dict[_Round, dict[int, tuple[int, int]]] = field(default_factory=dict)
    since: float = field(default_factory=time.monotonic)
    used: float = 0.0
    waited: float = -math.inf
    counted: int = 0

    @property
    def entries(self) -> int:
        of_rounds = sum(map(len, (*self.left.values(), *self.over.values())))
        return 1 + len(self.processes) + len(self.last) + len(self.evaluated) + of_rounds


class Attendance:
    """The runs that are remembered."""

    def __init__(self) -> None:
        self._runs: OrderedDict[Run, _Run] = OrderedDict()
        self._named: dict[str, dict[Run, None]] = {}
        """Those of the same name, the first heard of first."""
        self._entries = 0

    def __len__(self) -> int:
        return len(self._runs)

    def come(self, joint: wire.Joint, want_grad: bool, address: str = "") -> bool:
        """A rank comes to a step; if it had left this round, it is back.

        Args:
            address: where it came from; empty: unknown.

        Returns:
            Whether its training was restarted since it came or left last: no rank counts as having left then.

        Raises:
            RunConflictError: two trainings take turns in this run, or see :meth:`conflict`.
        """
        self._admit(joint)
        known, is_restarted = self._run_of(joint)
        known.address = address or known.address
        if joint.process:
            last = known.last.setdefault(joint.rank, _Process(joint.process, address))
            known.last[joint.rank] = last.followed_by(joint.process, address)
            if known.last[joint.rank] is not last and known.last[joint.rank].returns >= _RETURNS:
                self._count(known)
                raise RunConflictError(
                    f"two trainings take turns in run {joint.run!r}: rank {joint.rank} comes from two processes, this "
                    f"one{place(address)} and another{place(last.address)}; give each training a name or a secret of "
                    "its own"
                )
        for rounds in (known.left, known.over):
            rounds.get(_Round.of(joint), {}).pop(joint.rank, None)
        if not want_grad:
            known.evaluated.add(joint.rank)
        self._count(known)
        return is_restarted

    def leave(self, joint: wire.Joint, evaluation_step: int) -> bool:
        """A rank takes no part in the steps of its round from these on: ``joint.step`` is the one with a gradient.

        Returns:
            Whether that is new; False if it is said again after all ranks have left the round, as where an answer was
            lost.

        Raises:
            RunConflictError: see :meth:`conflict`.
        """
        self._admit(joint)
        known, _ = self._run_of(joint)
        its_round, first = _Round.of(joint), (joint.step, evaluation_step)
        is_new = known.over.get(its_round, {}).get(joint.rank) != first
        if is_new:
            left = known.left.setdefault(its_round, {})
            left[joint.rank] = first
            if len(left) == joint.world_size:
                known.over = {its_round: known.left.pop(its_round)}
        self._count(known)
        return is_new

    def absent(self, step: Step, world_size: int) -> set[int]:
        """The ranks that have left before a step."""
        known = self._runs.get(step.run)
        left = {} if known is None else known.left.get(_Round(world_size, step.round), {})
        return {rank for rank, first in left.items() if step.number >= first[0 if step.want_grad else 1]}

    def knows(self, run: Run) -> bool:
        """Whether ranks have come to a run."""
        return run in self._runs

    def conflict(self, run: Run) -> str:
        """Why ranks may not take part in a run: it has no owner, and one of the same name has. Empty: they may."""
        for other in () if run.owner else self._others(run.name):
            return (
                f"run {run.name!r} belongs to a training with a secret or a token{place(other.address)}: join it with "
                "that secret or token, or use another name"
            )
        return ""

    def warning(self, run: Run) -> str:
        """What the ranks of a run should know; empty: nothing."""
        known = self._runs.get(run)
        if known is None or len(self._named[run.name]) < 2:
            return ""
        for other in self._others(run.name):
            if other is not known and other.used > known.since:  # Else it may be this training, before its restart.
                return (
                    f"another training{place(other.address)} has a run of the name {run.name!r}, too: losses are "
                    "right, but the server's metrics mix the two; give each training a name of its own"
                )
        return ""

    def never_evaluated(self, run: Run, ranks: Iterable[int]) -> list[int]:
        """Those of the ranks that have come to no step without a gradient."""
        known = self._runs.get(run)
        return [rank for rank in ranks if known is None or rank not in known.evaluated]

    def since(self, run: Run) -> float:
        """When a run was first heard of, or was restarted (``time.monotonic``)."""
        known = self._runs.get(run)
        return math.inf if known is None else known.since

    def see(self, waiting: Iterable[Run]) -> None:
        """Ranks of these runs wait."""
        now = time.monotonic()
        for run in waiting:
            if run in self._runs:
                self._runs[run].waited = now

    def forget_old(self) -> None:
        """Forgets runs that nobody has come to for long."""
        until = time.monotonic() - RUN_SECONDS
        for run in [run for run, known in self._runs.items() if max(known.used, known.waited) < until]:
            self._forget(run)

    def _admit(self, joint: wire.Joint) -> None:
        conflict = "" if joint.secret else self.conflict(Run.of(joint))
        if conflict:
            raise RunConflictError(conflict)

    def _others(self, name: str) -> Iterator[_Run]:
        """The runs of this name that have an owner, and whose ranks came or waited a short while ago."""
        until = time.monotonic() - LIVE_SECONDS
        for run in islice(self._named.get(name, ()), _MOST_NAMED):
            known = self._runs[run]
            if run.owner and max(known.used, known.waited) > until:
                yield known

    def _run_of(self, joint: wire.Joint) -> tuple[_Run, bool]:
        """What is known of the run of a rank, now used, and whether it is a restarted one."""
        run, last = Run.of(joint), dict[int, _Process]()
        known = self._runs.get(run)
        process = None if known is None else known.processes.get(joint.rank)
        is_restarted = bool(process and joint.process and process != joint.process)
        if known is not None and is_restarted:
            last = known.last
            self._forget(run)
        known = self._runs.setdefault(run, _Run(last=last))
        self._named.setdefault(run.name, {})[run] = None
        self._runs.move_to_end(run)
        known.used = time.monotonic()
        if joint.process:
            known.processes.setdefault(joint.rank, joint.process)
        return known, is_restarted

    def _count(self, known: _Run) -> None:
        """Counts the entries of a run, which may have changed, and forgets runs if there are too many."""
        self._entries += known.entries - known.counted
        known.counted = known.entries
        while self._entries > MAX_ENTRIES:
            self._forget(next(iter(self._runs)))

    def _forget(self, run: Run) -> None:
        self._entries -= self._runs.pop(run).counted
        named = self._named[run.name]
        del named[run]
        if not named:
            del self._named[run.name]


def place(address: str) -> str:
    """Where a caller is, as the end of a phrase."""
    return f" at {address}" if address else ""
