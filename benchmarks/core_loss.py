"""The losses of ``lovasz.core`` beside the usual implementation and torch cross-entropy, in one run and in turn.

    python benchmarks/core_loss.py --json benchmarks/results/core_cpu.json --plot docs/figures

Forward and backward together, on shapes of segmentation and in three regimes of training (:mod:`workloads`). The usual
implementation is segmentation-models-pytorch's, if it is installed (benchmarks/requirements.txt), else the textbook's.
From a bare checkout, set PYTHONPATH=proto:client:server; needs torch and numpy, and matplotlib for --plot.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from report import LEGEND, Row, rows, setting, table, verdicts
from turns import Turns, copy_bytes_per_second
from workloads import FULL, QUICK

SECONDS_BETWEEN_LINES = 2.0


class ProgressLine:
    """Says on the standard error what is being done: on one line of a terminal, else a line every few seconds."""

    def __init__(self) -> None:
        self.prefix = ""
        self._start = time.monotonic()
        self._in_place = sys.stderr.isatty()
        self._last = -SECONDS_BETWEEN_LINES

    def __call__(self, text: str) -> None:
        elapsed = time.monotonic() - self._start
        line = f"{int(elapsed) // 60:3d}:{int(elapsed) % 60:02d}  {self.prefix}{text}"
        if self._in_place:
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        elif elapsed - self._last >= SECONDS_BETWEEN_LINES:
            self._last = elapsed
            print(line, file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._in_place:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--repeats", type=int, default=5, help="blocks of timed calls, each of about 0.4 s (default 5)")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--only", metavar="TEXT", default="", help="only workloads with this text in their names")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there, too")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw time and errors over pixels there")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats has to be at least 1")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.workloads = [workload for workload in (QUICK if args.quick else FULL) if args.only in workload.name]
    if not args.workloads:
        parser.error(f"no workload has {args.only!r} in its name")
    return args


def main() -> int:
    args = parsed()
    device, progress = torch.device(args.device), ProgressLine()
    bandwidth = copy_bytes_per_second(args.workloads[0], device) if device.type == "cuda" else None
    results: dict[str, Any] = {"setting": setting(device, args.repeats, bandwidth), "rows": []}
    known = {name: value for name, value in results["setting"].items() if value is not None}
    print("\n".join(f"{name}: {value}" for name, value in known.items()), flush=True)
    print(LEGEND, flush=True)
    measured: list[Row] = []
    failures: list[str] = []
    for number, workload in enumerate(args.workloads, start=1):
        progress.prefix = f"{number} of {len(args.workloads)}, {workload.name}, "
        turns = Turns(workload, device, args.repeats, progress)
        own = [row for regime, found in turns.regimes() for row in rows(workload, regime, found, bandwidth)]
        failures += turns.failures
        measured += own
        progress.clear()
        print(table(workload, own), flush=True)
        if args.json:  # after each workload, so that a run that is cut off leaves what it has
            results["rows"] = [dataclasses.asdict(row) for row in measured]
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    if device.type == "cpu" and not args.quick:
        print(verdicts(measured))
    if args.plot and any(row.growth for row in measured):
        from plots import draw

        for file in draw({**results, "rows": [dataclasses.asdict(row) for row in measured]}, args.plot):
            print(f"drawn: {file}")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
