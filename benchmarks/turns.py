"""Lets the contenders of a workload take turns.

Each has a process of its own, and is timed for a block of calls before the next one has its turn: two pools of threads
that alternate call by call keep each other's cores busy with spinning. Blocks come round again, so that a slow moment
of the machine meets all contenders.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from contenders import Contender, contenders_of, label
from crew import Worker, WorkerFailed
from workloads import REGIMES, Regime, Workload

BLOCK_SECONDS = 0.4
"""About so long is a block, and at least a call."""
MOST_CALLS = 50
SETTLED_SECONDS = 0.5
"""A block of shorter calls opens with one that is not timed: caches and threads are cold after the others' turns."""
SLOW_SECONDS = 1.5
SLOW_CALLS, SLOW_CALLS_OF_GROWTH = 3, 1
"""Longer calls are timed so often in a regime: their spread is small, and their number is most of a run's time."""

Progress = Callable[[str], None]


@dataclass
class Measurement:
    """One contender in one regime.

    Attributes:
        blocks: seconds of each call, a list a block.
        loss_error, grad_error: against float64, see :func:`truth.worst_errors`.
        peak_bytes: memory beyond the inputs, taken once a workload; None where the system does not say.
    """

    contender: Contender
    blocks: list[list[float]] = field(default_factory=list)
    loss_error: float = float("nan")
    grad_error: float = float("nan")
    peak_bytes: int | None = None


class Turns:
    """The contenders of one workload that are still in the race, and what is wrong with the others."""

    def __init__(self, workload: Workload, device: torch.device, repeats: int, progress: Progress) -> None:
        self.failures: list[str] = []
        self._workload = workload
        self._device = device
        self._repeats = repeats
        self._progress = progress
        self._workers: dict[Contender, Worker] = {}
        self._call_seconds: dict[Contender, float] = {}
        self._peak_bytes: dict[Contender, int | None] = {}

    def regimes(self) -> Iterator[tuple[Regime, list[Measurement]]]:
        """Measures one regime after the other."""
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            teller = stack.enter_context(self._worker(Contender.OURS))  # computes the true answers, and is not timed
            entered = contenders_of(self._workload, self._device)
            self._workers = {who: stack.enter_context(self._worker(who)) for who in entered}
            for regime in REGIMES:
                yield regime, self._regime(regime, teller, folder)

    def _worker(self, contender: Contender) -> Worker:
        return Worker(self._workload, contender, self._device.type)

    def _regime(self, regime: Regime, teller: Worker, folder: Path) -> list[Measurement]:
        self._progress(f"{regime.name}: true answers")
        truths = {kind: folder / f"{kind.value}.npz" for kind in {contender.truth for contender in self._workers}}
        for kind, file in truths.items():
            teller.ask("truth", regime=regime.name, kind=kind.value, file=str(file))
        for contender in list(self._workers):
            self._progress(f"{regime.name}: inputs of {label(contender)}")
            with self._left_out_if_it_fails(contender):
                self._make_ready(contender, regime)
        measured = {who: Measurement(who, peak_bytes=self._peak_bytes[who]) for who in self._workers}
        for turn in range(self._repeats):
            for contender in list(self._workers):
                if turn < self._turns(contender):
                    self._progress(f"{regime.name}: turn {turn + 1} of {self._turns(contender)}, {label(contender)}")
                    with self._left_out_if_it_fails(contender):
                        measured[contender].blocks.append(self._block(contender))
        for contender in list(self._workers):
            with self._left_out_if_it_fails(contender):
                errors = self._workers[contender].ask("errors", file=str(truths[contender.truth]))
                measured[contender].loss_error = errors["loss_error"]
                measured[contender].grad_error = errors["grad_error"]
        return [measured[contender] for contender in self._workers]

    def _make_ready(self, contender: Contender, regime: Regime) -> None:
        worker = self._workers[contender]
        worker.ask("inputs", regime=regime.name)
        if contender not in self._peak_bytes:  # later on, what it keeps between calls would not be seen
            first = worker.ask("first")
            self._call_seconds[contender] = first["seconds"]
            self._peak_bytes[contender] = first["peak_bytes"]

    def _turns(self, contender: Contender) -> int:
        if self._call_seconds[contender] < SLOW_SECONDS:
            return self._repeats
        return min(self._repeats, SLOW_CALLS_OF_GROWTH if self._workload.growth else SLOW_CALLS)

    def _block(self, contender: Contender) -> list[float]:
        expected = self._call_seconds[contender]
        calls = min(MOST_CALLS, max(1, round(BLOCK_SECONDS / expected)))
        untimed = 1 if expected < SETTLED_SECONDS else 0
        seconds: list[float] = self._workers[contender].ask("block", calls=calls, untimed=untimed)["seconds"]
        self._call_seconds[contender] = min(seconds)
        return seconds

    @contextlib.contextmanager
    def _left_out_if_it_fails(self, contender: Contender) -> Iterator[None]:
        try:
            yield
        except WorkerFailed as failure:
            self.failures.append(f"{self._workload.name}, {label(contender)}: {failure}")
            del self._workers[contender]


def copy_bytes_per_second(workload: Workload, device: torch.device) -> float:
    """Bandwidth of the device's memory, bytes read and written counted, as a copy within it reaches."""
    with Worker(workload, Contender.OURS, device.type) as worker:
        return float(worker.ask("bandwidth")["bytes_per_second"])
