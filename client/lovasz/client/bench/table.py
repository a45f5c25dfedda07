"""The table of the figures: its columns, and its rows as text."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lovasz.client.bench.measurement import Measurement
from lovasz.client.bench.text import milliseconds_text, shape_text
from lovasz.client.bench.workload import Workload


@dataclass(frozen=True)
class _Column:
    """A column. Neighbours of the same ``group`` have it as a common heading above their own."""

    heading: str
    text: Callable[[Measurement], str]
    group: str = ""
    width: int = 0
    left: bool = False

    def cell(self, text: str) -> str:
        return text.ljust(self.width) if self.left else text.rjust(self.width)


_LATENCY = "latency, ms"
_SPLIT = "where p50 goes, ms"
_COLUMNS = (
    _Column("shape", lambda m: shape_text(m.workload.shape), left=True),
    _Column("dtype", lambda m: m.workload.dtype.name, left=True),
    _Column("transport", lambda m: m.workload.transport.value, left=True),
    _Column("way", lambda m: m.way or "-", width=8, left=True),
    _Column("concurrency", lambda m: str(m.workload.concurrency)),
    _Column("requests", lambda m: str(m.requests)),
    _Column("errors", lambda m: str(m.errors)),
    _Column("requests/s", lambda m: f"{m.requests_per_second:.1f}"),
    _Column("MiB/s", lambda m: f"{m.mib_per_second:.1f}", width=6),
    _Column("p50", lambda m: milliseconds_text(m.latency_quantile(0.5)), _LATENCY, 6),
    _Column("p90", lambda m: milliseconds_text(m.latency_quantile(0.9)), _LATENCY, 6),
    _Column("p99", lambda m: milliseconds_text(m.latency_quantile(0.99)), _LATENCY, 6),
    _Column("max", lambda m: milliseconds_text(m.latency_quantile(1.0)), _LATENCY, 6),
    _Column("receive", lambda m: milliseconds_text(m.split.receive_seconds), _SPLIT, 6),
    _Column("queue", lambda m: milliseconds_text(m.split.queue_seconds), _SPLIT, 6),
    _Column("compute", lambda m: milliseconds_text(m.split.compute_seconds), _SPLIT, 6),
    _Column("copy", lambda m: milliseconds_text(m.split.copy_seconds), _SPLIT, 6),
    _Column("other", lambda m: milliseconds_text(m.split.other_seconds), _SPLIT, 6),
    _Column("batch", lambda m: "-" if math.isnan(m.mean_batch_requests) else f"{m.mean_batch_requests:.1f}"),
)


class Table:
    """Makes rows that can be printed one by one: the widths of the columns are known from the start."""

    def __init__(self, workloads: Sequence[Workload]) -> None:
        widest = {
            "shape": max(len(shape_text(workload.shape)) for workload in workloads),
            "dtype": max(len(workload.dtype.name) for workload in workloads),
        }
        self._columns = [
            dataclasses.replace(column, width=max(len(column.heading), column.width, widest.get(column.heading, 0)))
            for column in _COLUMNS
        ]

    @property
    def head(self) -> str:
        """Two lines: the groups, and the headings."""
        groups = []
        for group, columns in itertools.groupby(self._columns, lambda column: column.group):
            width = len("  ".join(column.cell("") for column in columns))
            groups.append(f" {group} ".center(width, "-") if group else " " * width)
        return "  ".join(groups).rstrip() + "\n" + self._line(column.heading for column in self._columns)

    def row(self, measurement: Measurement) -> str:
        return self._line(column.text(measurement) for column in self._columns)

    def _line(self, texts: Iterable[str]) -> str:
        return "  ".join(column.cell(text) for column, text in zip(self._columns, texts, strict=True))
