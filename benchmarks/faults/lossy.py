"""Runs a server and its callers where it stands, in a network that loses packets; prints what came of it."""

from __future__ import annotations

import sys
import time

import numpy as np

from benchmarks.faults.load import callers
from lovasz.server.launch import ServerProcess

if __name__ == "__main__":
    with ServerProcess(["--device", "cpu"]) as server, callers(server.target, 4) as counts:
        time.sleep(60 * float(sys.argv[1]))
    p50, p99 = np.quantile(counts.seconds or [float("nan")], [0.5, 0.99])
    print(f"{counts.answered} answers, {counts.wrong} wrong, {counts.failed} failed; p50 {p50:.2f} s, p99 {p99:.2f} s")
    sys.exit(bool(counts.wrong or counts.failed or not counts.answered))
