"""Times a joint step of several ranks: on a server, beside one request of all tensors; and in a process group.

    python -m benchmarks.joint --json benchmarks/results/joint_cpu.json

Each rank is a process of its own with a client of its own, as in a training; the server is another one, on loopback.
The single request comes from one more process. They take turns. A joint step lasts from the moment that the last rank
sends until the last rank has its gradient. The ranks of a process group take turns, too: with the joint loss, by tables
and by pixels, with each rank's own loss, with an all-reduce of all tables alone, and with the joint loss of the server.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import setting
from benchmarks.child import Child, ask_all
from benchmarks.joint.group import KINDS
from benchmarks.workloads import Workload
from lovasz.server.launch import ServerProcess

WARM_UP = 3
"""Untimed steps."""


@dataclass(frozen=True)
class Case:
    """A number of ranks, and the shape of the logits of each."""

    ranks: int
    logits: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """The milliseconds of each step, and their ratios turn by turn."""

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


def measured(case: Case, transport: str, target: str, turns: int) -> Row:
    images, *shape = case.logits
    whole, part = Workload((case.ranks * images, *shape)), Workload(case.logits)
    with ExitStack() as stack:

        def child(workload: Workload, rank: int | None) -> Child:
            return stack.enter_context(Child("benchmarks.joint.rank:Rank", target, workload, rank, case.ranks))

        one, ranks = [child(whole, None)], [child(part, rank) for rank in range(case.ranks)]
        ask_all([*one, *ranks], "connect")
        joint: list[float] = []
        single: list[float] = []
        for turn in range(WARM_UP + turns):
            joint.append(step_ms(ranks, turn))
            single.append(step_ms(one, turn))
        joint, single = joint[WARM_UP:], single[WARM_UP:]
        return Row(case, transport, joint, single, [a / b for a, b in zip(joint, single, strict=True)])


GROUPS = (Case(2, (1, 19, 512, 512)), Case(4, (1, 19, 512, 512)))


@dataclass(frozen=True)
class GroupRow:
    """The milliseconds of each step of a process group, by its kind.

    Attributes:
        ratios: turn by turn: the joint loss over the sum of own losses and all-reduce.
        traffic: bytes that a rank sends and receives in a step, by its kind; the mean of the ranks.
    """

    case: Case
    ms: dict[str, list[float]]
    ratios: list[float]
    traffic: dict[str, float]

    def text(self) -> str:
        shape = "x".join(map(str, self.case.logits))
        cells = " | ".join(
            f"{statistics.median(self.ms[kind]):.1f} ms, {self.traffic[kind] / 1e6:.1f} MB" for kind in KINDS
        )
        return f"| {self.case.ranks} x {shape} | {cells} | {statistics.median(self.ratios):.2f} |"


def measured_group(case: Case, store: str, targets: dict[str, str], turns: int) -> GroupRow:
    workload = Workload(case.logits)
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(Child("benchmarks.joint.group:GroupRank", store, targets, workload, rank, case.ranks))
            for rank in range(case.ranks)
        ]
        answers = [{kind: ask_all(ranks, "step", kind) for kind in KINDS} for _ in range(WARM_UP + turns)][WARM_UP:]
    steps = [{kind: milliseconds(spans) for kind, spans in step.items()} for step in answers]
    ratios = [step["process group"] / (step["own losses"] + step["all-reduce"]) for step in steps]
    traffic = {kind: statistics.mean(nbytes for _, _, nbytes in answers[-1][kind]) for kind in KINDS}
    return GroupRow(case, {kind: [step[kind] for step in steps] for kind in KINDS}, ratios, traffic)


def step_ms(ranks: list[Child], number: int) -> float:
    return milliseconds(ask_all(ranks, "step", number))


def milliseconds(spans: Sequence[Sequence[float]]) -> float:
    """The time of a step whose ranks are asked one after the other: it begins when the last one has begun.

    Args:
        spans: start, end and what else there is, of each rank.
    """
    return 1e3 * (max(span[1] for span in spans) - max(span[0] for span in spans))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=40, help="steps of each kind, in turn (default 40)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements to this file, too")
    args = parser.parse_args()
    rows, groups = [], []
    print("| ranks | transport | joint step | one request | ratio, median of turns |\n|---|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        listen = f"127.0.0.1:0,unix:{folder}/s"
        with ServerProcess(["--device", "cpu", "--listen", listen, "--shared-memory"]) as server:
            targets = dict(zip(("TCP", "shared memory"), server.targets, strict=True))
            for case in CASES:
                for transport, target in targets.items():
                    rows.append(measured(case, transport, target, args.turns))
                    print(rows[-1].text(), flush=True)
            print(f"\n| ranks | {' | '.join(KINDS)} | process group / (own losses + all-reduce) |")
            print(f"|---|{'---:|' * (len(KINDS) + 1)}", flush=True)
            for number, case in enumerate(GROUPS):
                groups.append(measured_group(case, f"{folder}/store{number}", targets, args.turns))
                print(groups[-1].text(), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        results = {"setting": setting.cpu_setting(args.turns), "rows": [asdict(row) for row in rows]}
        results["groups"] = [asdict(row) for row in groups]
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
