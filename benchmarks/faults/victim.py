"""A client process that says when it has begun to call, and calls until it is killed."""

from __future__ import annotations

import sys
import time

from benchmarks.faults.load import callers

if __name__ == "__main__":
    with callers(sys.argv[1], 2) as counts:
        while not counts.answered:
            time.sleep(0.01)
        print("calls", flush=True)
        time.sleep(600)
