"""The plot: how the latencies of each combination are distributed, and what their median consists of."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lovasz.client.bench.measurement import Measurement
from lovasz.client.bench.text import milliseconds_text, workload_text

_DARK, _LIGHT, _MARKED = "#404040", "#c9d8e4", "#d1602f"
_PARTS = {"receive": "#4178a4", "queue": "#e6a889", "compute": "#d1602f", "copy": "#6b9e78", "other": "#8a8a8a"}
"""The parts of :class:`Split` in the order of a request's way, and their colours."""
_WIDE_RATIO = 20.0
"""If the largest time exceeds the smallest by this factor, the latency axis is logarithmic and parts are in percent."""


def check_can_draw(path: Path) -> None:
    """Checks this before the load begins.

    Raises:
        ValueError: matplotlib is missing, or cannot write such a file.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot: matplotlib, which draws it, is not installed: pip install matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"--plot: got {str(path)!r}; expected a name that ends in .png, .pdf or .svg")


def draw(measurements: Sequence[Measurement], title: str, path: Path) -> None:
    """Draws each combination's latencies on the left, and the parts of their median on the right."""
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
        yticklabels=[workload_text(measurement.workload) for measurement in measurements],
    )
    if most.max() > _WIDE_RATIO * low.min():
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
    # Next to a long bar, the parts of a short one would be too small to see.
    in_percent = whole.max() > _WIDE_RATIO * whole.min()
    scale = 100 / whole if in_percent else np.full(rows.size, 1000.0)
    left = np.zeros(rows.size)
    for part, seconds in parts.items():
        split.barh(rows, scale * seconds, 0.5, left, color=_PARTS[part], label=part)
        left += scale * seconds
    for row, milliseconds in enumerate(median):
        text = f"{milliseconds_text(milliseconds / 1000)} ms"
        split.annotate(text, (left[row], row), (4, 0), textcoords="offset points", va="center")
    split.set(xlabel=f"parts of the median latency, {'% of it' if in_percent else 'ms'}", xlim=(0, 1.2 * left.max()))
    if in_percent:
        split.set_xticks(range(0, 101, 20))
    split.invert_yaxis()  # The first combination on top, on both axes.
    figure.legend(*split.get_legend_handles_labels(), loc="outside lower right", ncols=len(_PARTS), frameon=False)
    for axes in (spread, split):
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
