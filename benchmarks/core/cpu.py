"""Times the losses of ``lovasz.core`` on a CPU, beside the usual implementation and PyTorch's cross-entropy.

    python -m benchmarks.core.cpu --json benchmarks/results/core_cpu.json --plot docs/figures

Forward and backward together, on shapes of segmentation and in three regimes of training (benchmarks/workloads.py). The
contenders take turns. Needs the usual implementation (benchmarks/requirements.txt), and matplotlib for --plot.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import setting, usual
from benchmarks.core.report import LEGEND, Row, rows, table, verdicts
from benchmarks.core.turns import Turns
from benchmarks.progress import ProgressLine
from benchmarks.workloads import HEADLINE, Problem, Workload

FULL = (
    *HEADLINE,
    Workload((1, 19, 64, 64), requests=64),
    Workload((1, 19, 1024, 2048)),
    Workload((1, 150, 512, 512)),
    Workload((8, 512, 512), Problem.HINGE),
    Workload((120_000, 20)),
    *(Workload((1, 3, side, side), growth=True) for side in (256, 512, 1024, 2048, 4096)),
)
QUICK = (
    Workload((1, 19, 64, 128)),
    Workload((2, 21, 256, 128)),
    Workload((1, 19, 32, 32), requests=8),
    Workload((2, 64, 64), Problem.HINGE),
    Workload((3000, 20)),
    *(Workload((1, 3, side, side), growth=True) for side in (32, 128)),
)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="blocks of timed calls, of about 0.4 s each (default 5)")
    parser.add_argument("--quick", action="store_true", help="small shapes, to check that it runs")
    parser.add_argument("--only", metavar="TEXT", default="", help="only workloads with this text in their names")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements to this file, too")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw time and errors over pixels into this folder")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats: must be at least 1")
    if not usual.installed():
        parser.error(usual.MISSING)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot: needs matplotlib")
    args.workloads = [workload for workload in (QUICK if args.quick else FULL) if args.only in workload.name]
    if not args.workloads:
        parser.error(f"--only: no workload has {args.only!r} in its name")
    return args


def main() -> int:
    args = parsed()
    progress = ProgressLine()
    results: dict[str, Any] = {"setting": setting.cpu_setting(args.repeats), "rows": []}
    print(setting.lines(results["setting"]), flush=True)
    print(LEGEND, flush=True)
    measured: list[Row] = []
    failures: list[str] = []
    for number, workload in enumerate(args.workloads, start=1):
        progress.prefix = f"{number} of {len(args.workloads)}, {workload.name}, "
        turns = Turns(workload, args.repeats, progress)
        own = [row for regime, found in turns.regimes() for row in rows(workload, regime, found)]
        failures += turns.failures
        measured += own
        progress.clear()
        print(table(workload, own), flush=True)
        if args.json:  # After each workload, so that an interrupted run keeps what it has measured.
            results["rows"] = [dataclasses.asdict(row) for row in measured]
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    if not args.quick:
        print(verdicts(measured))
    if args.plot and any(row.growth for row in measured):
        from benchmarks.core.plot import draw

        for file in draw({**results, "rows": [dataclasses.asdict(row) for row in measured]}, args.plot):
            print(f"drawn: {file}")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
