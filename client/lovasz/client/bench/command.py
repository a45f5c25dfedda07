"""What ``lovasz bench`` does: measures each combination in turn, and reports it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from lovasz.client.bench import arguments, plot
from lovasz.client.bench.arguments import Settings
from lovasz.client.bench.live import Live
from lovasz.client.bench.load import measure
from lovasz.client.bench.measurement import Measurement, Progress
from lovasz.client.bench.report import Report
from lovasz.client.bench.text import shape_text
from lovasz.client.bench.workload import Workload
from lovasz.client.client import LossClient
from lovasz.client.options import ClientOptions

INTERRUPTED = 130
"""The exit status after Ctrl-C, as of any program that SIGINT ended."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Makes it the parser of this command."""
    arguments.add_arguments(parser)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Exit status: 0, or 130 after Ctrl-C.

    Raises:
        ValueError: an argument is invalid.
        LossError: the server cannot be reached, or cannot compute the loss.
        OSError: a file cannot be written.
    """
    if parsed.plot is not None:
        plot.check_can_draw(parsed.plot)
    settings = Settings.of(parsed)
    report = Report(settings, sys.stdout)
    live = Live(len(settings.workloads), sys.stderr)
    try:
        try:
            interrupted = _run_all(settings, report, live)
        finally:
            # Even if a combination failed: the figures of the others are kept.
            live.clear()
            report.end()
    except KeyboardInterrupt:  # Before, between or after the combinations.
        interrupted = True
    if interrupted:
        print("lovasz: interrupted", file=sys.stderr)
    return INTERRUPTED if interrupted else 0


def _run_all(settings: Settings, report: Report, live: Live) -> bool:
    """Returns whether Ctrl-C ended it."""
    options = ClientOptions(settings.timeout_seconds, access=settings.access)
    with LossClient.with_options(settings.target, options) as client:
        report.begin(client.server_info())
    for workload in settings.workloads:
        live.begin(workload)
        measurement = _measured(workload, settings, live.update)
        live.clear()
        report.add(measurement)
        if measurement.interrupted:
            return True
    return False


def _measured(workload: Workload, settings: Settings, watch: Callable[[Progress], None]) -> Measurement:
    try:
        return measure(
            settings.target,
            workload,
            duration_seconds=settings.duration_seconds,
            warmup_seconds=settings.warmup_seconds,
            timeout_seconds=settings.timeout_seconds,
            access=settings.access,
            device=settings.device,
            watch=watch,
        )
    except MemoryError:
        shape = shape_text(workload.shape)
        raise ValueError(
            f"--shape: got {shape}, which there is not enough memory for; expected a smaller one"
        ) from None
