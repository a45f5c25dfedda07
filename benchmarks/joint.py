"""What joining costs: a step of several ranks that come together, against one request that holds all their tensors.

    python benchmarks/joint.py --json benchmarks/results/joint_cpu.json

Each rank is a process of its own with a client of its own, as in a training; the server is another, on loopback. The
single request comes from one more process. They take turns; a joint step lasts from the moment that all ranks are let
go until the last has its gradient.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from report import setting
from workloads import Workload, regime_named

from lovasz.client import Joint, LossClient, LovaszSoftmax
from lovasz.server.launch import ServerProcess

CPU = torch.device("cpu")
LOSS = LovaszSoftmax()
ANSWER_SECONDS = 120.0
WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """So many ranks with logits of this shape each."""

    ranks: int
    logits: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    case: Case
    transport: str
    joint_ms: list[float]
    single_ms: list[float]
    ratios: list[float]

    def text(self) -> str:
        joint, single = statistics.median(self.joint_ms), statistics.median(self.single_ms)
        shape = "x".join(map(str, self.case.logits))
        return (
            f"| {self.case.ranks} x {shape} | {self.transport} | {joint:.1f} ms | {single:.1f} ms | "
            f"{statistics.median(self.ratios):.2f} |"
        )


CASES = (Case(2, (1, 19, 512, 512)), Case(4, (1, 19, 256, 512)), Case(8, (1, 19, 256, 256)), Case(4, (1, 19, 64, 64)))


def rank(asked: Connection, target: str, case: Case, number: int | None) -> None:
    """A process: one rank, or the single request of all (None); answers each step with its start and end."""
    torch.set_num_threads(1)
    images = case.logits[0] * (case.ranks if number is None else 1)
    workload = Workload((images, *case.logits[1:]))
    ((logits, labels),) = workload.inputs(regime_named("half-trained"), CPU)
    labels = labels.to(torch.uint8)
    with LossClient(target, timeout=ANSWER_SECONDS) as client:
        asked.send("ready")
        while (step := asked.recv()) is not None:
            joint = None if number is None else Joint("benchmark", number, case.ranks, step)
            started = time.monotonic()
            client.compute(logits, labels, LOSS, joint=joint)
            asked.send((started, time.monotonic()))


def received(pipe: Connection) -> Any:
    if not pipe.poll(ANSWER_SECONDS):
        raise TimeoutError("a rank did not answer")
    return pipe.recv()


def measured(case: Case, transport: str, target: str, turns: int) -> Row:
    context = get_context("spawn")
    with ExitStack() as stack:
        pipes = []
        for number in [None, *range(case.ranks)]:
            pipe, other = context.Pipe()
            process = context.Process(target=rank, args=(other, target, case, number), daemon=True)
            process.start()
            stack.callback(process.join, 10)
            stack.callback(pipe.send, None)
            pipes.append(pipe)
        for pipe in pipes:
            received(pipe)

        def step(which: list[Connection], number: int) -> float:
            for pipe in which:
                pipe.send(number)
            spans: list[tuple[float, float]] = [received(pipe) for pipe in which]
            # Ranks are let go one after the other; a step begins when the last has begun.
            return max(end for _, end in spans) - max(start for start, _ in spans)

        joint: list[float] = []
        single: list[float] = []
        for turn in range(WARM_UP + turns):
            joint.append(1e3 * step(pipes[1:], turn))
            single.append(1e3 * step(pipes[:1], turn))
        joint, single = joint[WARM_UP:], single[WARM_UP:]
        return Row(case, transport, joint, single, [a / b for a, b in zip(joint, single, strict=True)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=40, help="steps of each, in turn (default: 40)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there, too")
    args = parser.parse_args()
    rows = []
    print("| ranks | transport | joint step | one request | ratio, median of turns |\n|---|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        listen = f"127.0.0.1:0,unix:{folder}/s"
        with ServerProcess(["--device", "cpu", "--listen", listen, "--shared-memory"]) as server:
            for case in CASES:
                for transport, target in zip(("TCP", "shared memory"), server.targets, strict=True):
                    rows.append(measured(case, transport, target, args.turns))
                    print(rows[-1].text(), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        results = {"setting": setting(CPU, args.turns, None), "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
