"""The command ``lovasz bench``: puts a load on a server, shows it live, and prints, saves and draws the figures."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from lovasz import spec, wire
from lovasz.client.client import DEFAULT_TIMEOUT_SECONDS, TRANSPORTS, LossClient, ServerInfo
from lovasz.client.load import (
    DEFAULT_DTYPE,
    DEFAULT_DURATION_SECONDS,
    DEFAULT_TRANSPORT,
    DEFAULT_WARMUP_SECONDS,
    Measurement,
    Phase,
    Progress,
    Workload,
    loss_for,
    measure,
)
from lovasz.version import VERSION

DEFAULT_SHAPE = (1, 19, 512, 1024)
DEFAULT_LOSS = "lovasz_softmax"
MAX_CONCURRENCY = 1024
INTERRUPTED = 130
"""The exit status after Ctrl-C, as of any program that SIGINT ended."""

_COLUMNS_IF_UNKNOWN = 80
"""Of a terminal that does not say how wide it is."""

_DARK, _LIGHT, _MARKED = "#404040", "#c9d8e4", "#d1602f"
_PARTS = {"receive": "#4178a4", "queue": "#e6a889", "compute": "#d1602f", "other": "#8a8a8a"}
"""Of :class:`Split`, in the order of a request's way, and their colours."""
_WIDE = 20.0
"""Where the longest is so many times the shortest, the axis of latencies is logarithmic, and parts are in percent."""

_EPILOG = """\
Every combination of shape, dtype, transport and concurrency is run in turn. Of several values, list them behind one
option or repeat it; TARGET goes before them. Latency is what the client's caller waits. The server's receive, queue
and compute are medians of what it reports; "other" is the client's median less these: encoding, the way down, decoding.
MiB/s counts the tensors of answered requests in both directions. "batch" is how many requests shared a batch."""

# --- The command line -------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "lovasz bench TARGET [options]"
    parser.description = "Measures how many losses a server computes a second, and where the time of each goes."
    parser.epilog = _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    def several(option: str, parse: Callable[[str], Any], metavar: str, text: str) -> None:
        parser.add_argument(option, type=parse, nargs="+", action="extend", metavar=metavar, help=text)

    parser.add_argument("target", metavar="TARGET", help="HOST:PORT, unix:/path, or inprocess for no server at all")
    several("--shape", _shape, "NxCxSIZES", f"shape of the logits (default: {_times(DEFAULT_SHAPE)})")
    several(
        "--dtype",
        _one_of(wire.FLOATS),
        "DTYPE",
        f"as which they travel: {_listed(wire.FLOATS)} (default: {DEFAULT_DTYPE})",
    )
    several("--transport", _one_of(TRANSPORTS), "KIND", f"{_listed(TRANSPORTS)} (default: {DEFAULT_TRANSPORT})")
    several("--concurrency", _concurrency, "N", "clients at a time, each in a thread of its own (default: 1)")
    parser.add_argument(
        "--duration",
        type=_seconds_above_zero,
        default=DEFAULT_DURATION_SECONDS,
        metavar="SECONDS",
        help=f"of each combination (default: {DEFAULT_DURATION_SECONDS:g})",
    )
    parser.add_argument(
        "--warmup",
        type=_seconds,
        default=DEFAULT_WARMUP_SECONDS,
        metavar="SECONDS",
        help=f"before it, unmeasured (default: {DEFAULT_WARMUP_SECONDS:g}; one request is sent even with 0)",
    )
    parser.add_argument(
        "--loss",
        type=_one_of(spec.LOSS_KINDS),
        default=DEFAULT_LOSS,
        metavar="LOSS",
        help=f"{_listed(spec.LOSS_KINDS)} (default: {DEFAULT_LOSS})",
    )
    parser.add_argument("--no-grad", action="store_true", help="ask for the loss alone, as in validation")
    parser.add_argument(
        "--timeout",
        type=_seconds_above_zero,
        default=DEFAULT_TIMEOUT_SECONDS,
        metavar="SECONDS",
        help=f"for each call (default: {DEFAULT_TIMEOUT_SECONDS:g})",
    )
    parser.add_argument("--json", type=_new_file, metavar="FILE", help="write all figures there, too")
    parser.add_argument("--plot", type=_new_file, metavar="FILE.png", help="draw them there (needs matplotlib)")


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if len(sizes) < 2 or not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected N x C x sizes such as {_times(DEFAULT_SHAPE)}")
    return tuple(int(size) for size in sizes)


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"got {text!r}; expected {_listed(names)}")
        return text

    return parse


def _concurrency(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_CONCURRENCY):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number in [1, {MAX_CONCURRENCY}]")
    return int(text)


def _seconds(text: str) -> float:
    seconds = _number(text)
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected seconds >= 0")
    return seconds


def _seconds_above_zero(text: str) -> float:
    seconds = _number(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected seconds > 0")
    return seconds


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a file in a directory that is there")
    return path


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _times(sizes: Sequence[int]) -> str:
    return "x".join(str(size) for size in sizes)


def _workloads(options: argparse.Namespace) -> list[Workload]:
    combinations = itertools.product(
        options.shape or [DEFAULT_SHAPE],
        options.dtype or [DEFAULT_DTYPE],
        options.transport or [DEFAULT_TRANSPORT],
        options.concurrency or [1],
    )
    return [
        Workload(shape, loss_for(options.loss, shape), dtype, transport, concurrency, not options.no_grad)
        for shape, dtype, transport, concurrency in combinations
    ]


# --- What it does -----------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Exit status: 0, or 130 after Ctrl-C.

    Raises:
        ValueError: what was asked for cannot be.
        LossError: the server cannot be reached, or cannot compute this.
        OSError: a file cannot be written.
    """
    if options.plot is not None:
        _check_can_draw(options.plot)
    workloads = _workloads(options)
    report = _Report(options, workloads, sys.stdout)
    live = _Live(len(workloads), sys.stderr)
    try:
        try:
            interrupted = _run_all(workloads, options, report, live)
        finally:
            # Also when one of them cannot be run: the figures of the others stand.
            live.clear()
            report.end()
    except KeyboardInterrupt:  # Before, between or after them.
        interrupted = True
    if interrupted:
        print("lovasz: interrupted", file=sys.stderr)
    return INTERRUPTED if interrupted else 0


def _run_all(workloads: Sequence[Workload], options: argparse.Namespace, report: _Report, live: _Live) -> bool:
    """Returns whether Ctrl-C ended it."""
    with LossClient(options.target, timeout=options.timeout) as client:
        report.begin(client.server_info())
    for workload in workloads:
        live.begin(workload)
        measurement = _measured(workload, options, live.update)
        live.clear()
        report.add(measurement)
        if measurement.interrupted:
            return True
    return False


def _measured(workload: Workload, options: argparse.Namespace, watch: Callable[[Progress], None]) -> Measurement:
    try:
        return measure(
            options.target,
            workload,
            duration_seconds=options.duration,
            warmup_seconds=options.warmup,
            timeout_seconds=options.timeout,
            watch=watch,
        )
    except MemoryError:
        size = _times(workload.shape)
        raise ValueError(f"--shape: got {size}, which there is not enough memory for; expected a smaller one") from None


class _Live:
    """What is under way: on a terminal one line that is written again and again, elsewhere a line a combination."""

    def __init__(self, combinations: int, stream: TextIO) -> None:
        self._combinations = combinations
        self._stream = stream
        self._terminal = stream.isatty()
        self._number = 0
        self._name = ""

    def begin(self, workload: Workload) -> None:
        self._number += 1
        self._name = _name(workload)
        if not self._terminal:
            print(f"{self._number}/{self._combinations} {self._name}", file=self._stream, flush=True)

    def update(self, progress: Progress) -> None:
        if not self._terminal:
            return
        line = f"{self._number}/{self._combinations} {progress.phase.value}"
        if progress.phase is not Phase.FIRST:
            line += f" {progress.elapsed_seconds:.1f} s, {progress.requests} requests"
            line += f", {progress.requests_per_second:.1f}/s, p50 {_ms(progress.p50_seconds)} ms"
        if progress.errors:
            line += f", {progress.errors} errors"
        line += f"  ({self._name})"
        # Longer than the terminal is wide, it would leave lines behind.
        self._stream.write(f"\r{line[: self._columns() - 1]}\x1b[K")
        self._stream.flush()

    def clear(self) -> None:
        if self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or _COLUMNS_IF_UNKNOWN
        except OSError:
            return _COLUMNS_IF_UNKNOWN


class _Report:
    """What is printed, saved and drawn, a combination at a time."""

    def __init__(self, options: argparse.Namespace, workloads: Sequence[Workload], stream: TextIO) -> None:
        self._options = options
        self._stream = stream
        self._table = Table(workloads)
        self._combinations = len(workloads)
        self._asked = options.loss + ("" if options.no_grad else " and its gradient")
        self._server: ServerInfo | None = None
        self._measurements: list[Measurement] = []

    def begin(self, server: ServerInfo) -> None:
        """Prints what is measured, and the table's head."""
        self._server = server
        options = self._options
        devices = ", ".join(f"{device.name} ({device.hardware})" for device in server.devices) or "no device"
        self._print(f"{options.target}: lovasz {server.version} on {devices}")
        self._print(f"{self._asked}; {options.duration:g} s each, after {options.warmup:g} s to warm up")
        self._print(self._table.head)
        self._save()

    def add(self, measurement: Measurement) -> None:
        """Prints its row, and writes the file anew, so that nothing is lost of a long run."""
        if measurement.requests + measurement.errors == 0:
            return  # Interrupted before the first.
        self._measurements.append(measurement)
        self._print(self._table.row(measurement))
        for failures in measurement.failures:
            self._print(f"  {failures.count} x {failures.kind}, the first: {failures.first}")
        self._save()

    def end(self) -> None:
        answered = [measurement for measurement in self._measurements if measurement.requests]
        if self._options.plot is not None and answered:
            draw(answered, f"{self._options.target}: {self._asked}", self._options.plot)

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def _save(self) -> None:
        options, server = self._options, self._server
        if options.json is None:
            return
        whole = [measurement for measurement in self._measurements if not measurement.interrupted]
        figures = {
            "target": options.target,
            "client": VERSION,
            "server": None if server is None else dataclasses.asdict(server),
            "loss": options.loss,
            "want_grad": not options.no_grad,
            "duration_seconds": options.duration,
            "warmup_seconds": options.warmup,
            "timeout_seconds": options.timeout,
            "complete": len(whole) == self._combinations,
            "combinations": [_figures(measurement) for measurement in self._measurements],
        }
        options.json.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")


# --- The figures, as text, JSON and a picture -------------------------------------------------------------------------


def _name(workload: Workload) -> str:
    clients = "1 client" if workload.concurrency == 1 else f"{workload.concurrency} clients"
    return f"{_times(workload.shape)} {workload.dtype} {workload.transport}, {clients}"


def _ms(seconds: float) -> str:
    """Three digits at least, so that columns stay narrow."""
    milliseconds = 1000 * seconds
    if math.isnan(milliseconds):
        return "-"
    return f"{milliseconds:.{2 if abs(milliseconds) < 10 else 1 if abs(milliseconds) < 100 else 0}f}"


@dataclass(frozen=True)
class _Column:
    """``group``: what stands above its heading, and above its neighbours' of the same group."""

    heading: str
    text: Callable[[Measurement], str]
    group: str = ""
    width: int = 0
    left: bool = False

    def cell(self, text: str) -> str:
        return text.ljust(self.width) if self.left else text.rjust(self.width)


_LATENCY = "latency, ms"
_PARTS_OF_P50 = "where p50 goes, ms"
_COLUMNS = (
    _Column("shape", lambda m: _times(m.workload.shape), left=True),
    _Column("dtype", lambda m: m.workload.dtype, left=True),
    _Column("transport", lambda m: m.workload.transport, left=True),
    _Column("concurrency", lambda m: str(m.workload.concurrency)),
    _Column("requests", lambda m: str(m.requests)),
    _Column("errors", lambda m: str(m.errors)),
    _Column("requests/s", lambda m: f"{m.requests_per_second:.1f}"),
    _Column("MiB/s", lambda m: f"{m.mib_per_second:.1f}", width=6),
    _Column("p50", lambda m: _ms(m.latency_quantile(0.5)), _LATENCY, 6),
    _Column("p90", lambda m: _ms(m.latency_quantile(0.9)), _LATENCY, 6),
    _Column("p99", lambda m: _ms(m.latency_quantile(0.99)), _LATENCY, 6),
    _Column("max", lambda m: _ms(m.latency_quantile(1.0)), _LATENCY, 6),
    _Column("receive", lambda m: _ms(m.split.receive_seconds), _PARTS_OF_P50, 6),
    _Column("queue", lambda m: _ms(m.split.queue_seconds), _PARTS_OF_P50, 6),
    _Column("compute", lambda m: _ms(m.split.compute_seconds), _PARTS_OF_P50, 6),
    _Column("copy", lambda m: _ms(m.split.copy_seconds), _PARTS_OF_P50, 6),
    _Column("other", lambda m: _ms(m.split.other_seconds), _PARTS_OF_P50, 6),
    _Column("batch", lambda m: "-" if math.isnan(m.mean_batch_requests) else f"{m.mean_batch_requests:.1f}"),
)


class Table:
    """Rows that can be printed one by one: the columns' widths are known from the start."""

    def __init__(self, workloads: Sequence[Workload]) -> None:
        widest = {
            "shape": max(len(_times(workload.shape)) for workload in workloads),
            "dtype": max(len(workload.dtype) for workload in workloads),
        }
        self._columns = [
            dataclasses.replace(column, width=max(len(column.heading), column.width, widest.get(column.heading, 0)))
            for column in _COLUMNS
        ]

    @property
    def head(self) -> str:
        """Two lines."""
        groups = []
        for group, columns in itertools.groupby(self._columns, lambda column: column.group):
            width = len("  ".join(column.cell("") for column in columns))
            groups.append(f" {group} ".center(width, "-") if group else " " * width)
        return "  ".join(groups).rstrip() + "\n" + self._line(column.heading for column in self._columns)

    def row(self, measurement: Measurement) -> str:
        return self._line(column.text(measurement) for column in self._columns)

    def _line(self, texts: Iterable[str]) -> str:
        return "  ".join(column.cell(text) for column, text in zip(self._columns, texts, strict=True))


def _figures(measurement: Measurement) -> dict[str, Any]:
    """Of one combination, for JSON, which has no NaN."""
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
        "dtype": workload.dtype,
        "transport": workload.transport,
        "concurrency": workload.concurrency,
        "payload_bytes": workload.payload_bytes,
        "elapsed_seconds": measurement.elapsed_seconds,
        "warmup_requests": measurement.warmup_requests,
        "requests": measurement.requests,
        "errors": {failures.kind: failures.count for failures in measurement.failures},
        "requests_per_second": measurement.requests_per_second,
        "mib_per_second": measurement.mib_per_second,
        **{what: {name: _or_none(1000 * seconds) for name, seconds in them.items()} for what, them in times.items()},
        "mean_batch_requests": _or_none(measurement.mean_batch_requests),
        "interrupted": measurement.interrupted,
    }


def _or_none(figure: float) -> float | None:
    return None if math.isnan(figure) else figure


def _check_can_draw(path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot: matplotlib, which draws it, is not installed: pip install matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"--plot: got {str(path)!r}; expected a name that ends in .png, .pdf or .svg")


def draw(measurements: Sequence[Measurement], title: str, path: Path) -> None:
    """Draws how each combination's latencies are spread, and beside it what their median is made of."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rows = np.arange(len(measurements))
    figure = Figure(figsize=(11, 2.2 + 0.36 * rows.size), layout="constrained")
    spread, split = figure.subplots(1, 2, sharey=True)
    figure.suptitle(title, fontsize=10)

    low, lower, median, upper, high, most = (
        1000 * np.array([measurement.latency_quantile(share) for measurement in measurements])
        for share in (0.01, 0.25, 0.5, 0.75, 0.99, 1.0)
    )
    spread.hlines(rows, low, high, color=_DARK, linewidth=1)
    spread.barh(rows, upper - lower, 0.5, lower, color=_LIGHT, edgecolor=_DARK, linewidth=1)
    spread.vlines(median, rows - 0.25, rows + 0.25, color=_MARKED, linewidth=2.5)
    spread.plot(most, rows, ".", color=_DARK)
    spread.set(
        xlabel="latency, ms (median, middle half, 1 % to 99 %, slowest)",
        yticks=rows,
        yticklabels=[_name(measurement.workload) for measurement in measurements],
    )
    if most.max() > _WIDE * low.min():
        spread.set_xscale("log")
        spread.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        spread.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        spread.xaxis.set_minor_formatter(NullFormatter())
    else:
        spread.set_xlim(left=0)

    parts = {
        part: np.array([max(0.0, getattr(measurement.split, f"{part}_seconds")) for measurement in measurements])
        for part in _PARTS
    }
    whole = sum(parts.values(), np.zeros(rows.size))
    # Beside a long bar, the parts of a short one cannot be seen.
    in_percent = whole.max() > _WIDE * whole.min()
    scale = 100 / whole if in_percent else np.full(rows.size, 1000.0)
    left = np.zeros(rows.size)
    for part, seconds in parts.items():
        split.barh(rows, scale * seconds, 0.5, left, color=_PARTS[part], label=part)
        left += scale * seconds
    for row, milliseconds in enumerate(median):
        text = f"{_ms(milliseconds / 1000)} ms"
        split.annotate(text, (left[row], row), (4, 0), textcoords="offset points", va="center")
    split.set(xlabel=f"parts of the median latency, {'% of it' if in_percent else 'ms'}", xlim=(0, 1.2 * left.max()))
    if in_percent:
        split.set_xticks(range(0, 101, 20))
    split.invert_yaxis()  # The first combination on top; both axes share it.
    figure.legend(*split.get_legend_handles_labels(), loc="outside lower right", ncols=len(_PARTS), frameon=False)
    for axes in (spread, split):
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
