"""Lets the contenders of a workload take turns.

Each contender has a process of its own and is timed for a block of calls before the next one has its turn. (If they
alternated call by call, the idle threads of one would still spin on the cores that the other needs.) There are several
rounds of blocks, so that a slow moment of the machine affects all contenders.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.child import Child, ChildFailed
from benchmarks.contenders import Contender, contenders_on_cpu
from benchmarks.progress import Progress
from benchmarks.workloads import REGIMES, Regime, Workload

BLOCK_SECONDS = 0.4
"""About how long a block takes; it has at least one call."""
MOST_CALLS = 50
SETTLED_SECONDS = 0.5
"""A block of shorter calls begins with an untimed one: caches and threads are cold after the others' turns."""
SLOW_SECONDS = 1.5
SLOW_CALLS, SLOW_CALLS_OF_GROWTH = 3, 1
"""How many calls that are longer than that are timed: they differ little, and take most of a run's time."""


@dataclass
class Measurement:
    """One contender in one regime.

    Attributes:
        blocks: the seconds of each call, a list for each block.
        loss_error, grad_error: see :func:`benchmarks.truth.worst_errors`.
        peak_bytes: memory beyond the inputs, measured once for a workload; None where the system does not tell.
    """

    contender: Contender
    blocks: list[list[float]] = field(default_factory=list)
    loss_error: float = float("nan")
    grad_error: float = float("nan")
    peak_bytes: int | None = None


class Turns:
    """The contenders of one workload that have not failed, and the failures of the others."""

    def __init__(self, workload: Workload, repeats: int, progress: Progress) -> None:
        self.failures: list[str] = []
        self._workload = workload
        self._repeats = repeats
        self._progress = progress
        self._workers: dict[Contender, Child] = {}
        self._call_seconds: dict[Contender, float] = {}
        self._peak_bytes: dict[Contender, int | None] = {}

    def regimes(self) -> Iterator[tuple[Regime, list[Measurement]]]:
        """Measures all contenders in one regime after the other."""
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            oracle = stack.enter_context(self._worker(Contender.OURS))  # Computes the true answers, and is not timed.
            entered = contenders_on_cpu(self._workload)
            self._workers = {who: stack.enter_context(self._worker(who)) for who in entered}
            for regime in REGIMES:
                yield regime, self._regime(regime, oracle, folder)

    def _worker(self, contender: Contender) -> Child:
        return Child("benchmarks.core.worker:Worker", self._workload, contender)

    def _regime(self, regime: Regime, oracle: Child, folder: Path) -> list[Measurement]:
        self._progress(f"{regime.name}: true answers")
        truths = {kind: folder / f"{kind.value}.npz" for kind in {contender.truth for contender in self._workers}}
        for kind, file in truths.items():
            oracle.ask("save_truth", regime, kind, file)
        for contender in list(self._workers):
            self._progress(f"{regime.name}: inputs of {contender.value}")
            with self._left_out_if_it_fails(contender):
                self._prepare(contender, regime)
        measured = {who: Measurement(who, peak_bytes=self._peak_bytes[who]) for who in self._workers}
        for turn in range(self._repeats):
            for contender in list(self._workers):
                if turn < self._turns(contender):
                    self._progress(f"{regime.name}: turn {turn + 1} of {self._turns(contender)}, {contender.value}")
                    with self._left_out_if_it_fails(contender):
                        measured[contender].blocks.append(self._block(contender))
        for contender in list(self._workers):
            with self._left_out_if_it_fails(contender):
                errors = self._workers[contender].ask("errors", truths[contender.truth])
                measured[contender].loss_error, measured[contender].grad_error = errors
        return [measured[contender] for contender in self._workers]

    def _prepare(self, contender: Contender, regime: Regime) -> None:
        worker = self._workers[contender]
        worker.ask("set_inputs", regime)
        if contender not in self._peak_bytes:  # Later calls would not show the memory that it keeps between calls.
            self._call_seconds[contender], self._peak_bytes[contender] = worker.ask("first")

    def _turns(self, contender: Contender) -> int:
        if self._call_seconds[contender] < SLOW_SECONDS:
            return self._repeats
        return min(self._repeats, SLOW_CALLS_OF_GROWTH if self._workload.growth else SLOW_CALLS)

    def _block(self, contender: Contender) -> list[float]:
        expected = self._call_seconds[contender]
        calls = min(MOST_CALLS, max(1, round(BLOCK_SECONDS / expected)))
        untimed = 1 if expected < SETTLED_SECONDS else 0
        seconds: list[float] = self._workers[contender].ask("block", calls, untimed)
        self._call_seconds[contender] = min(seconds)
        return seconds

    @contextlib.contextmanager
    def _left_out_if_it_fails(self, contender: Contender) -> Iterator[None]:
        try:
            yield
        except ChildFailed as failure:
            self.failures.append(f"{self._workload.name}, {contender.value}: {failure}")
            del self._workers[contender]
