"""What comes out: rows, the table, how the targets were met, and the setting that all of it was measured in."""

from __future__ import annotations

import datetime
import math
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contenders import SMP, Contender, label, version
from turns import Measurement
from workloads import HEADLINE, Regime, Workload


@dataclass(frozen=True)
class Row:
    """One contender on one workload in one regime.

    Attributes:
        contender: the name of a :class:`Contender`.
        label: what the table calls it.
        pixels: of a request.
        blocks_ms: each timed call, for all requests of the workload, a list a block.
        faster_than_usual: how many times as long the usual implementation takes.
        of_cross_entropy: the time in multiples of torch cross-entropy's.
        of_bound: the time in multiples of what the device's memory alone would take, see :func:`bound_ms`; GPU only.
        loss_error, grad_error: against float64; of the loss relative to it, of the gradient to its norm.
        peak_of_logits: memory beyond the inputs, gradient included, in multiples of the logits.
    """

    workload: str
    growth: bool
    pixels: int
    logits_bytes: int
    regime: str
    contender: str
    label: str
    median_ms: float
    min_ms: float
    max_ms: float
    faster_than_usual: float | None
    of_cross_entropy: float | None
    of_bound: float | None
    loss_error: float
    grad_error: float
    peak_of_logits: float | None
    blocks_ms: list[list[float]]


def bound_ms(workload: Workload, copy_bytes_per_second: float) -> float:
    """What no implementation on the device can beat: the logits read twice and the gradient written once, as fast as a
    copy within its memory is."""
    return 1e3 * 3 * workload.logits_bytes / copy_bytes_per_second


def rows(
    workload: Workload, regime: Regime, measured: Iterable[Measurement], copy_bytes_per_second: float | None
) -> list[Row]:
    measured = [measurement for measurement in measured if measurement.blocks]
    calls = {m.contender: [1e3 * call for block in m.blocks for call in block] for m in measured}
    medians = {contender: statistics.median(times) for contender, times in calls.items()}
    usual, cross_entropy = medians.get(Contender.USUAL), medians.get(Contender.CROSS_ENTROPY)
    return [
        Row(
            workload.name,
            workload.growth,
            workload.pixels,
            workload.logits_bytes,
            regime.name,
            m.contender.name,
            label(m.contender),
            medians[m.contender],
            min(calls[m.contender]),
            max(calls[m.contender]),
            None if usual is None else usual / medians[m.contender],
            None if cross_entropy is None else medians[m.contender] / cross_entropy,
            None if copy_bytes_per_second is None else medians[m.contender] / bound_ms(workload, copy_bytes_per_second),
            m.loss_error,
            m.grad_error,
            None if m.peak_bytes is None else m.peak_bytes / workload.logits_bytes,
            [[1e3 * call for call in block] for block in m.blocks],
        )
        for m in measured
    ]


def table(workload: Workload, measured: Sequence[Row]) -> str:
    """The rows of one workload."""
    bound = any(row.of_bound is not None for row in measured)
    lines = [
        "",
        f"{workload.name} ({workload.logits_bytes / 2**20:.3g} MiB of logits)",
        f"  {'regime':<13} {'':<32} {'median ms':>10} {'min - max':>21} {'x usual':>8} {'of c.-e.':>8}"
        + f" {'of bound':>8}" * bound
        + f" {'loss error':>10} {'grad error':>10} {'memory':>7}",
    ]
    for row in measured:
        spread = f"{row.min_ms:.2f} - {row.max_ms:.2f}"
        lines.append(
            f"  {row.regime:<13} {row.label:<32} {row.median_ms:>10.2f} {spread:>21}"
            f" {_number(row.faster_than_usual, 1)} {_number(row.of_cross_entropy, 2)}"
            + f" {_number(row.of_bound, 2)}" * bound
            + f" {row.loss_error:>10.1e} {row.grad_error:>10.1e} {_number(row.peak_of_logits, 2, 7)}"
        )
    return "\n".join(lines)


LEGEND = """
median, min - max: milliseconds of forward and backward, over all requests of the workload
x usual:   how many times as long the usual implementation takes
of c.-e.:  time in multiples of torch cross-entropy's (for the hinge: binary cross-entropy's)
of bound:  time in multiples of reading the logits twice and writing the gradient once at the speed of a copy (GPU)
errors:    against float64, of the loss relative to it, of the gradient relative to its norm; the worst request
memory:    peak beyond the inputs, gradient included, in multiples of the logits; taken once a workload"""


def _number(value: float | None, digits: int, width: int = 8) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


@dataclass(frozen=True)
class Target:
    """A column of our own rows that is to stay at or below a number (at or above it, if ``at_least``)."""

    text: str
    column: str
    value: float
    headline_only: bool
    at_least: bool = False

    def verdict(self, measured: Iterable[Row]) -> str | None:
        """Names the worst row; None where nothing was measured that it speaks of."""
        headline = {workload.name for workload in HEADLINE}
        ours = (row for row in measured if row.contender == Contender.OURS.name)
        rows = [row for row in ours if not self.headline_only or row.workload in headline]
        found = [(getattr(row, self.column), row) for row in rows if getattr(row, self.column) is not None]
        if not found:
            return None
        sign = -1 if self.at_least else 1
        worst, row = max(found, key=lambda pair: math.inf if math.isnan(pair[0]) else sign * pair[0])
        met = sign * worst <= sign * self.value
        return f"  {'met' if met else 'MISSED':<6} {self.text}: {worst:.3g} at worst ({row.workload}, {row.regime})"


CPU_TARGETS = (
    Target("at least 30 x the usual implementation", "faster_than_usual", 30, headline_only=True, at_least=True),
    Target("at most cross-entropy's time", "of_cross_entropy", 1.0, headline_only=True),
    Target("memory of at most 2.5 x the logits", "peak_of_logits", 2.5, headline_only=True),
    Target("loss within 1e-6 of float64", "loss_error", 1e-6, headline_only=False),
    Target("gradient within 2e-5 of its norm", "grad_error", 2e-5, headline_only=False),
)


def verdicts(measured: Sequence[Row]) -> str:
    found = [verdict for target in CPU_TARGETS if (verdict := target.verdict(measured)) is not None]
    return "\n".join(["", "targets on a CPU:", *found])


def setting(device: torch.device, repeats: int, copy_bytes_per_second: float | None) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "chip": _chip(device),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": version("numba"),
        "triton": version("triton"),
        "usual implementation": f"{SMP} {found}"
        if (found := version(SMP))
        else f"the textbook's, as {SMP} is not here",
        "repeats": repeats,
        "copy_bytes_per_second": copy_bytes_per_second,
    }


def _chip(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
