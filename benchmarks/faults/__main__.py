"""Runs the long attacks, one after the other.

    python -m benchmarks.faults --minutes 5 --json benchmarks/results/faults_cpu.json --plot docs/figures

The exit status is 1 if a scenario did not hold. Scenarios that the machine cannot run are skipped, with the reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks import setting
from benchmarks.faults.plot import draw
from benchmarks.faults.scenarios import SCENARIOS, Outcome
from benchmarks.progress import ProgressLine

_HELD = {True: "yes", False: "NO", None: "skipped"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="of each scenario (default: 5)")
    parser.add_argument("--only", choices=tuple(SCENARIOS), help="run this scenario alone")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--plot", type=Path, help="draw faults.png into this folder")
    arguments = parser.parse_args()
    progress, outcomes = ProgressLine(), list[Outcome]()
    for name, scenario in SCENARIOS.items():
        if arguments.only in (None, name):
            outcomes.append(scenario(arguments.minutes, progress))
    progress.clear()
    print("| scenario | tried | found | held |\n|---|---|---|---|")
    for one in outcomes:
        print(f"| {one.name} | {one.tried} | {one.found} | {_HELD[one.held]} |")
    results = {"setting": setting.cpu_setting(1), "outcomes": [asdict(one) for one in outcomes]}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.plot:
        draw(results, arguments.plot)
    return int(any(one.held is False for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
