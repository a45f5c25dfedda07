"""Our server beside NVIDIA's Triton Inference Server, asked in turn by clients of the same form."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.child import Child, ChildFailed
from benchmarks.progress import Progress
from benchmarks.remote.effort import Effort
from benchmarks.remote.load import Load
from benchmarks.remote.report import Column, Part
from benchmarks.workloads import CLASSES, Workload
from lovasz.server.launch import ServerProcess

LEAVE_SECONDS = 45.0
LOG_CHARACTERS = 1000


@dataclass(frozen=True)
class Case:
    """A load on both servers: one client for each request of the workload.

    Attributes:
        ours, theirs: timed calls of each client.
        untimed: calls of each client before those.
        max_turns: how often it is measured.
    """

    workload: Workload
    ours: int
    theirs: int
    untimed: int = 1
    max_turns: int = 1 << 30

    @property
    def clients(self) -> int:
        return self.workload.requests


CASES = (
    Case(Workload((1, CLASSES, 512, 1024)), 10, 2),
    Case(Workload((1, CLASSES, 64, 64)), 200, 50),
    Case(Workload((1, CLASSES, 64, 64), requests=16), 50, 8),
    Case(Workload((4, CLASSES, 64, 64), requests=16), 30, 2),
)
FULL_CASES = (*CASES, Case(Workload((1, CLASSES, 512, 1024), requests=16), 1, 1, untimed=0, max_turns=1))


class AgainstInferenceServer:
    """Measures both servers.

    Args:
        python: the interpreter of an environment with Triton Inference Server.
    """

    def __init__(self, python: Path, server: ServerProcess, quick: bool, effort: Effort, progress: Progress) -> None:
        self._python = python
        self._target = server.target
        self._cases = CASES if quick else FULL_CASES
        self._effort = effort
        self._progress = progress
        self._threads = torch.get_num_threads()

    def part(self) -> Part:
        ours: dict[Case, list[Load]] = {case: [] for case in self._cases}
        theirs: dict[str, dict[Case, list[Load]]] = {}
        with Child("benchmarks.remote.our_clients:OurClients", self._target) as our_clients:
            for name, instances, threads in (
                ("one instance", 1, self._threads),
                ("two instances of one thread", 2, 1),
            ):
                theirs[name] = {case: [] for case in self._cases}
                self._progress(f"Triton Inference Server, {name}: starting")
                with self._their_clients(instances, threads) as their_clients:
                    for case, turn in self._turns():
                        shape, clients = case.workload.shape, case.clients
                        self._progress(
                            f"Triton Inference Server, {name}, turn {turn + 1}, {clients} clients of {shape}"
                        )
                        ours[case].append(our_clients.ask("load", case.workload, case.ours, case.untimed))
                        theirs[name][case].append(their_clients.ask("load", case.workload, case.theirs, case.untimed))
        rows = [self._row(case, ours[case], {name: own[case] for name, own in theirs.items()}) for case in self._cases]
        return Part(
            "triton",
            "Our server and Triton Inference Server with the usual implementation",
            f"Clients are threads of one process, each with a connection; latencies are medians. Both servers have "
            f"{self._threads} threads. Triton Inference Server has one instance of the model, or two of one thread "
            "each, whichever answered more requests a second.",
            (
                Column("shape", "shape", ""),
                Column("clients", "clients", "d"),
                Column("ours_ms", "ours, ms", ".1f"),
                Column("triton_ms", "theirs, ms", ".1f"),
                Column("ours_per_second", "ours, requests/s", ".1f"),
                Column("triton_per_second", "theirs, requests/s", ".1f"),
                Column("ratio", "ours of theirs", ".1f"),
                Column("triton_setting", "theirs with", ""),
            ),
            rows,
        )

    def _turns(self) -> Iterator[tuple[Case, int]]:
        for turn in range(self._effort.inference_server_turns):
            yield from ((case, turn) for case in self._cases if turn < case.max_turns)

    @contextmanager
    def _their_clients(self, instances: int, threads: int) -> Iterator[Child]:
        """Starts Triton Inference Server, and its clients."""
        module = "benchmarks.remote.inference_server:InferenceServer"
        with (
            tempfile.TemporaryFile("w+", errors="replace") as log,
            Child(module, instances, threads, python=self._python, log=log, leave_seconds=LEAVE_SECONDS) as server,
        ):
            try:
                target: str = server.ask("target")
            except ChildFailed as failure:
                log.seek(0)
                said = log.read()[-LOG_CHARACTERS:]
                raise RuntimeError(f"Triton Inference Server did not start: {failure}\n{said}") from None
            module = "benchmarks.remote.inference_client:InferenceClients"
            with Child(module, target, python=self._python) as clients:
                yield clients

    def _row(self, case: Case, ours: list[Load], theirs: dict[str, list[Load]]) -> dict[str, Any]:
        rates = {name: _rate(own) for name, own in theirs.items()}
        best = max(rates, key=lambda name: rates[name])
        return {
            "shape": case.workload.shape,
            "clients": case.clients,
            "ours_ms": _median_latency_ms(ours),
            "triton_ms": _median_latency_ms(theirs[best]),
            "ours_per_second": _rate(ours),
            "triton_per_second": rates[best],
            "ratio": _rate(ours) / rates[best],
            "triton_setting": best,
            "triton_per_second_each": rates,
        }


def _rate(loads: list[Load]) -> float:
    return statistics.median(load.calls_per_second for load in loads)


def _median_latency_ms(loads: list[Load]) -> float:
    return 1e3 * float(np.median([call for load in loads for client in load.latencies for call in client]))
