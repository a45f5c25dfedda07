"""How shapes, times, names and workloads are written in tables, error texts and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lovasz.client.bench.workload import Workload


def shape_text(sizes: Sequence[int]) -> str:
    """Such as 1x19x512x1024."""
    return "x".join(str(size) for size in sizes)


def milliseconds_text(seconds: float) -> str:
    """Milliseconds with three digits or more, so that columns stay narrow; "-" for NaN."""
    milliseconds = 1000 * seconds
    if math.isnan(milliseconds):
        return "-"
    return f"{milliseconds:.{2 if abs(milliseconds) < 10 else 1 if abs(milliseconds) < 100 else 0}f}"


def choice_text(names: Sequence[str]) -> str:
    """Such as a, b or c."""
    return f"{', '.join(names[:-1])} or {names[-1]}"


def workload_text(workload: Workload) -> str:
    """A workload on one line."""
    clients = "1 client" if workload.concurrency == 1 else f"{workload.concurrency} clients"
    return f"{shape_text(workload.shape)} {workload.dtype.name} {workload.transport.value}, {clients}"
