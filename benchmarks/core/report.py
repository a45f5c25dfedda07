"""The results of the CPU benchmark: rows, tables, and whether the targets were met."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.contenders import Contender
from benchmarks.core.turns import Measurement
from benchmarks.truth import GRAD_ERROR_ALLOWED, LOSS_ERROR_ALLOWED
from benchmarks.workloads import HEADLINE, Regime, Workload


@dataclass(frozen=True)
class Row:
    """One contender on one workload in one regime.

    Attributes:
        contender: the name of a :class:`Contender`; ``label`` is its value.
        pixels: of a request.
        faster_than_usual: how many times as long the usual implementation takes.
        of_cross_entropy: the time in multiples of that of PyTorch's cross-entropy.
        of_warm_cross_entropy: the same, where its buffers are warm pages.
        loss_error, grad_error: see :func:`benchmarks.truth.worst_errors`.
        peak_of_logits: memory beyond the inputs, gradient included, in multiples of the logits.
        blocks_ms: each timed call, of all requests of the workload; a list for each block.
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
    of_warm_cross_entropy: float | None
    loss_error: float
    grad_error: float
    peak_of_logits: float | None
    blocks_ms: list[list[float]]


def rows(workload: Workload, regime: Regime, measured: Iterable[Measurement]) -> list[Row]:
    measured = [measurement for measurement in measured if measurement.blocks]
    calls = {m.contender: [1e3 * call for block in m.blocks for call in block] for m in measured}
    medians = {contender: statistics.median(times) for contender, times in calls.items()}
    usual, cross_entropy = medians.get(Contender.USUAL), medians.get(Contender.CROSS_ENTROPY)
    warm = medians.get(Contender.WARM_CROSS_ENTROPY)
    return [
        Row(
            workload.name,
            workload.growth,
            workload.pixels,
            workload.logits_bytes,
            regime.name,
            m.contender.name,
            m.contender.value,
            medians[m.contender],
            min(calls[m.contender]),
            max(calls[m.contender]),
            None if usual is None else usual / medians[m.contender],
            None if cross_entropy is None else medians[m.contender] / cross_entropy,
            None if warm is None else medians[m.contender] / warm,
            m.loss_error,
            m.grad_error,
            None if m.peak_bytes is None else m.peak_bytes / workload.logits_bytes,
            [[1e3 * call for call in block] for block in m.blocks],
        )
        for m in measured
    ]


def table(workload: Workload, measured: Sequence[Row]) -> str:
    """The rows of one workload as text."""
    lines = [
        "",
        f"{workload.name} ({workload.logits_bytes / 2**20:.3g} MiB of logits)",
        f"  {'regime':<13} {'':<32} {'median ms':>10} {'min - max':>21} {'x usual':>8} {'of c.-e.':>8} {'of warm':>8}"
        f" {'loss error':>10} {'grad error':>10} {'memory':>7}",
    ]
    for row in measured:
        spread = f"{row.min_ms:.2f} - {row.max_ms:.2f}"
        lines.append(
            f"  {row.regime:<13} {row.label:<32} {row.median_ms:>10.2f} {spread:>21}"
            f" {_number(row.faster_than_usual, 1)} {_number(row.of_cross_entropy, 2)}"
            f" {_number(row.of_warm_cross_entropy, 2)}"
            f" {row.loss_error:>10.1e} {row.grad_error:>10.1e} {_number(row.peak_of_logits, 2, 7)}"
        )
    return "\n".join(lines)


LEGEND = """
median, min - max: milliseconds of forward and backward, over all requests of the workload
x usual:   how many times as long the usual implementation takes
of c.-e.:  time in multiples of that of PyTorch's cross-entropy (for the hinge: of binary cross-entropy)
of warm:   the same, where the buffers of cross-entropy are warm pages
errors:    against float64; of the loss relative to it, of the gradient relative to its norm; the worst request
memory:    peak beyond the inputs, gradient included, in multiples of the logits; measured once for a workload"""


def _number(value: float | None, digits: int, width: int = 8) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


@dataclass(frozen=True)
class Target:
    """The largest value that a column of our own rows may have (the smallest, if ``at_least``)."""

    text: str
    column: str
    value: float
    headline_only: bool
    at_least: bool = False

    def verdict(self, measured: Iterable[Row]) -> str | None:
        """Whether it was met, and in which row it was closest to being missed; None if no row was measured for it."""
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
    Target("at most 1.3 x cross-entropy on warm pages", "of_warm_cross_entropy", 1.3, headline_only=True),
    Target("memory of at most 2.5 x the logits", "peak_of_logits", 2.5, headline_only=True),
    Target("loss within 1e-6 of float64", "loss_error", LOSS_ERROR_ALLOWED, headline_only=False),
    Target("gradient within 2e-5 of its norm", "grad_error", GRAD_ERROR_ALLOWED, headline_only=False),
)


def verdicts(measured: Sequence[Row]) -> str:
    found = [verdict for target in CPU_TARGETS if (verdict := target.verdict(measured)) is not None]
    return "\n".join(["", "targets on a CPU:", *found])
