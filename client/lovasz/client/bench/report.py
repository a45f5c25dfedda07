"""The report: prints, saves and draws the figures as the combinations end."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, TextIO

from lovasz.client.bench import plot
from lovasz.client.bench.arguments import Settings
from lovasz.client.bench.measurement import Measurement
from lovasz.client.bench.table import Table
from lovasz.client.target import ServerInfo
from lovasz.version import VERSION


class Report:
    """The figures of all combinations so far."""

    def __init__(self, settings: Settings, stream: TextIO) -> None:
        self._settings = settings
        self._stream = stream
        self._table = Table(settings.workloads)
        self._requested = settings.loss + (" and its gradient" if settings.want_grad else "")
        self._server: ServerInfo | None = None
        self._measurements: list[Measurement] = []

    def begin(self, server: ServerInfo) -> None:
        """Prints what is measured, and the table's head."""
        self._server = server
        settings = self._settings
        devices = ", ".join(f"{device.name} ({device.hardware})" for device in server.devices) or "no device"
        self._print(f"{settings.target}: lovasz {server.version} on {devices}")
        self._print(
            f"{self._requested}; {settings.duration_seconds:g} s each, after {settings.warmup_seconds:g} s to warm up"
        )
        self._print(self._table.head)
        self._save()

    def add(self, measurement: Measurement) -> None:
        """Prints a combination's row and rewrites the file, so that an interrupted run loses nothing."""
        if measurement.requests + measurement.errors == 0:
            return  # Interrupted before the first measured request.
        self._measurements.append(measurement)
        self._print(self._table.row(measurement))
        for failures in measurement.failures:
            self._print(f"  {failures.count} x {failures.kind}, the first: {failures.first}")
        self._save()

    def end(self) -> None:
        """Draws the plot, if one is wanted."""
        answered = [measurement for measurement in self._measurements if measurement.requests]
        if self._settings.plot is not None and answered:
            plot.draw(answered, f"{self._settings.target}: {self._requested}", self._settings.plot)

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def _save(self) -> None:
        settings, server = self._settings, self._server
        if settings.json is None:
            return
        complete = [measurement for measurement in self._measurements if not measurement.interrupted]
        figures = {
            "target": settings.target,
            "client": VERSION,
            "server": None if server is None else dataclasses.asdict(server),
            "loss": settings.loss,
            "want_grad": settings.want_grad,
            "duration_seconds": settings.duration_seconds,
            "warmup_seconds": settings.warmup_seconds,
            "timeout_seconds": settings.timeout_seconds,
            "device": settings.device,
            "complete": len(complete) == len(settings.workloads),
            "combinations": [_figures(measurement) for measurement in self._measurements],
        }
        settings.json.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _figures(measurement: Measurement) -> dict[str, Any]:
    """The figures of one combination for JSON, which has no NaN."""
    workload, split = measurement.workload, measurement.split
    quantiles = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    times = {
        "latency_ms": {name: measurement.latency_quantile(share) for name, share in quantiles.items()},
        "split_ms": {
            "receive": split.receive_seconds,
            "queue": split.queue_seconds,
            "compute": split.compute_seconds,
            "copy": split.copy_seconds,
            "other": split.other_seconds,
        },
    }
    return {
        "shape": workload.shape,
        "dtype": workload.dtype.name,
        "transport": workload.transport.value,
        "way": measurement.way,
        "concurrency": workload.concurrency,
        "payload_bytes": workload.payload_bytes,
        "elapsed_seconds": measurement.elapsed_seconds,
        "warmup_requests": measurement.warmup_requests,
        "requests": measurement.requests,
        "errors": {failures.kind: failures.count for failures in measurement.failures},
        "requests_per_second": measurement.requests_per_second,
        "mib_per_second": measurement.mib_per_second,
        **{key: {name: _or_none(1000 * seconds) for name, seconds in values.items()} for key, values in times.items()},
        "mean_batch_requests": _or_none(measurement.mean_batch_requests),
        "interrupted": measurement.interrupted,
    }


def _or_none(figure: float) -> float | None:
    return None if math.isnan(figure) else figure
