"""Times the remote call on loopback: our transports, beside peers that move the same bytes.

    python -m benchmarks.remote --json benchmarks/results/data_plane_cpu.json --plot docs/figures

Servers and clients are processes of their own, and contenders take turns. --inference-server PYTHON compares with
NVIDIA's Triton Inference Server, too; PYTHON is the interpreter of an environment of its own (make
.venv-inference-server/.installed). Takes a few minutes; --quick only checks that it runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import setting, usual
from benchmarks.progress import Progress, ProgressLine
from benchmarks.remote.connections import connections
from benchmarks.remote.crossover import crossover
from benchmarks.remote.effort import FULL, QUICK
from benchmarks.remote.fairness import fairness
from benchmarks.remote.fixed import fixed_cost
from benchmarks.remote.inference import AgainstInferenceServer
from benchmarks.remote.large import LargeRequest
from benchmarks.remote.report import Part, markdown
from benchmarks.remote.small import small_requests
from lovasz.server.launch import ServerProcess

TERMINATED = 128 + signal.SIGTERM
PARTS = ("fixed", "large", "crossover", "small", "connections", "fairness", "inference-server")


def measure(args: argparse.Namespace, progress: Progress) -> Iterator[Part]:
    """Measures part by part, all with one server of ours."""
    effort = QUICK if args.quick else FULL
    with tempfile.TemporaryDirectory() as folder:
        listen = f"127.0.0.1:0,unix:{folder}/lovasz"
        with ServerProcess(["--device", "cpu", "--listen", listen, "--shared-memory"]) as server:
            if "fixed" in args.only:
                yield fixed_cost(server, effort, progress)
            if "large" in args.only:
                yield LargeRequest(server, effort, progress).part()
            if "crossover" in args.only:
                yield from crossover(server, effort, progress)
            for name, part in (("small", small_requests), ("connections", connections), ("fairness", fairness)):
                if name in args.only:
                    yield part(server, effort, progress)
            if "inference-server" in args.only and args.inference_server:
                yield AgainstInferenceServer(args.inference_server, server, args.quick, effort, progress).part()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repetitions, to check that it runs")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="only these parts")
    parser.add_argument(
        "--inference-server",
        type=Path,
        metavar="PYTHON",
        help="compare with Triton Inference Server, from the environment of this Python",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements to this file, too")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw data_plane.png into this folder")
    args = parser.parse_args()
    if "large" in args.only and not usual.installed():
        parser.error(usual.MISSING)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot: needs matplotlib")
    if args.inference_server and not os.access(args.inference_server, os.X_OK):
        parser.error(f"--inference-server: {args.inference_server} cannot be run")
    return args


def main() -> int:
    args, progress = parsed(), ProgressLine()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # Leaves each ``with``, which ends the servers.
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = str(threads)  # For the servers.
    results: dict[str, Any] = {"setting": setting.cpu_setting((QUICK if args.quick else FULL).turns), "parts": {}}
    results["setting"]["quick"] = args.quick
    print(setting.lines(results["setting"]), flush=True)
    for part in measure(args, progress):
        progress.clear()
        print(markdown(part), flush=True)
        results["parts"][part.key] = part.as_json()
        if args.json:  # After each part, so that an interrupted run keeps what it has measured.
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    progress.clear()
    if not args.inference_server:
        print("\nNot compared with Triton Inference Server, as --inference-server was not given.")
    if args.plot and "large" in results["parts"]:
        from benchmarks.remote.plot import draw

        print(f"\ndrawn: {draw(results, args.plot)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
