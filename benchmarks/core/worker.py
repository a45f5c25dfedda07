"""One contender on one workload, in a child process."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks import truth
from benchmarks.contenders import Answers, Contender, Run, Truth, bind
from benchmarks.core.memory import Meter, keep_freed_memory
from benchmarks.workloads import CPU, FRESH, Pair, Regime, Workload
from lovasz.core.dispatch import installed, warm_up


class Worker:
    def __init__(self, workload: Workload, contender: Contender) -> None:
        if contender is Contender.WARM_CROSS_ENTROPY:
            keep_freed_memory()
        self._workload = workload
        self._contender = contender
        self._pairs: list[Pair] = []
        self._run: Run | None = None
        self._answers: Answers = []

    def set_inputs(self, regime: Regime) -> None:
        """Makes the inputs of a regime, in place of those before."""
        self._run, self._answers, self._pairs = None, [], []
        self._pairs = self._workload.inputs(regime)
        self._run = bind(self._contender, self._workload.problem, self._pairs)

    def first(self) -> tuple[float, int | None]:
        """The seconds of the first call, and its peak memory in bytes; None where the system does not tell.

        A small call of the same kind comes before it, and all code is compiled, so that neither compiling nor starting
        threads counts. Buffers that the small call keeps are too small to hide those of the first call.
        """
        if self._contender.is_compiled and installed("numba"):
            _compile()
        small = self._workload.small()
        bind(self._contender, small.problem, small.inputs(FRESH))()
        meter = Meter(CPU)
        return self._timed(), meter.peak_bytes()

    def block(self, calls: int, untimed: int) -> list[float]:
        """The seconds of consecutive calls, without those of some untimed calls before them."""
        return [self._timed() for _ in range(untimed + calls)][untimed:]

    def errors(self, file: Path) -> tuple[float, float]:
        """The errors of loss and gradient in the last call, against the true answers in a file."""
        return truth.worst_errors(file, self._answers)

    def save_truth(self, regime: Regime, kind: Truth, file: Path) -> None:
        """Computes the true answers of a regime and writes them to a file."""
        truth.save(file, kind, self._workload.problem, self._workload.inputs(regime))

    def _timed(self) -> float:
        assert self._run is not None
        self._answers = []  # A training step, too, frees the last gradient before it computes the next.
        start = time.perf_counter()
        self._answers = self._run()
        return time.perf_counter() - start


def _compile() -> None:
    """Compiles all loops of the CPU, and frees what that kept."""
    from lovasz.core.backends.numba.scratch import SCRATCH

    warm_up(CPU)
    SCRATCH.take()
