"""One contender on one workload, in a process of its own: does what the lines on its standard input ask for.

    python core_worker.py "1x19x512x1024" "lovasz.core" cpu

A question is a line of JSON, ``{"do": "block", "calls": 3, "untimed": 1}``, and so is the answer; the end of the input
ends the process. Between questions it sleeps, and takes no core from the others. :mod:`crew` is the other side.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
import truth
from contenders import Answers, Contender, Run, Truth, bind
from memory import Meter
from workloads import REGIMES, Pair, regime_named, workload_named

COPY_BYTES = 1 << 30
COPIES = 20


class CoreWorker:
    """The questions are its public methods."""

    def __init__(self, workload: str, contender: str, device: str) -> None:
        self.workload = workload_named(workload)
        self.contender = Contender(contender)
        self.device = torch.device(device)
        self._pairs: list[Pair] = []
        self._run: Run | None = None
        self._answers: Answers = []

    def inputs(self, regime: str) -> dict[str, Any]:
        """Makes the inputs of a regime, in the place of the last one's."""
        self._run, self._answers, self._pairs = None, [], []
        self._pairs = self.workload.inputs(regime_named(regime), self.device)
        self._run = bind(self.contender, self.workload.problem, self._pairs)
        return {}

    def first(self) -> dict[str, Any]:
        """The first call, and what memory it takes. Before it, a small call of the same kind compiles code and starts
        threads, so that neither counts; the buffers that it may keep are too small to hide the real ones."""
        small = self.workload.small()
        bind(self.contender, small.problem, small.inputs(REGIMES[0], self.device))()
        meter = Meter(self.device)
        seconds = self._timed()
        return {"seconds": seconds, "peak_bytes": meter.peak_bytes()}

    def block(self, calls: int, untimed: int) -> dict[str, Any]:
        """Calls behind one another, the first few of them not timed."""
        times = [self._timed() for _ in range(untimed + calls)]
        return {"seconds": times[untimed:]}

    def errors(self, file: str) -> dict[str, Any]:
        """How far the last call's answers are from those in a file."""
        loss_error, grad_error = truth.worst_errors(Path(file), self._answers)
        return {"loss_error": loss_error, "grad_error": grad_error}

    def truth(self, regime: str, kind: str, file: str) -> dict[str, Any]:
        """Computes the true answers of a regime and leaves them in a file."""
        pairs = self.workload.inputs(regime_named(regime), self.device)
        truth.keep(Path(file), Truth(kind), self.workload.problem, pairs)
        torch.cuda.empty_cache()  # leaves the memory to the contenders; does nothing without a GPU
        return {}

    def bandwidth(self) -> dict[str, Any]:
        """Bytes read and written a second by a copy within the device's memory."""
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        times = []
        for _ in range(COPIES):
            self._synchronise()
            start = time.perf_counter()
            target.copy_(source)
            self._synchronise()
            times.append(time.perf_counter() - start)
        return {"bytes_per_second": 2 * COPY_BYTES / statistics.median(times)}

    def _timed(self) -> float:
        assert self._run is not None
        self._answers = []  # a training step, too, drops the last gradient before it computes the next
        self._synchronise()
        start = time.perf_counter()
        self._answers = self._run()
        self._synchronise()
        return time.perf_counter() - start

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def serve(questions: TextIO, answers: TextIO, worker: CoreWorker) -> None:
    known: dict[str, Callable[..., dict[str, Any]]] = {
        "inputs": worker.inputs,
        "first": worker.first,
        "block": worker.block,
        "errors": worker.errors,
        "truth": worker.truth,
        "bandwidth": worker.bandwidth,
    }
    for line in questions:
        question = json.loads(line)
        try:
            answer = known[question.pop("do")](**question)
        except Exception as error:  # whatever a contender raises belongs into the report
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    # What libraries print must not come between the answers: it goes to the standard error.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.stdin, answers, CoreWorker(*sys.argv[1:4]))


if __name__ == "__main__":
    main()
