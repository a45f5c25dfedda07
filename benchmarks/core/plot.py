"""Draws the results of the CPU benchmark over the number of pixels: time, and errors against float64.

python -m benchmarks.core.plot benchmarks/results/core_cpu.json docs/figures
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from benchmarks import palette
from benchmarks.palette import MARKERS
from benchmarks.truth import GRAD_ERROR_ALLOWED, LOSS_ERROR_ALLOWED
from benchmarks.workloads import HALF_TRAINED

COLOURS = {
    "OURS": palette.OURS,
    "SORTED": palette.PALE,
    "USUAL": palette.USUAL,
    "CROSS_ENTROPY": palette.NEUTRAL,
}
ERRORS = {
    "loss_error": ("loss, relative", LOSS_ERROR_ALLOWED),
    "grad_error": ("gradient, relative to its norm", GRAD_ERROR_ALLOWED),
}
"""The name of each error, and how large ours may be."""
LEAST_ERROR = 1e-12
"""Smaller errors are drawn here: a logarithmic axis has no 0."""

Rows = list[dict[str, Any]]
"""Of :class:`benchmarks.core.report.Row`, as in the JSON."""


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Writes ``core_time_<device>.png`` and ``core_error_<device>.png`` into the folder and returns their paths."""
    growth = [row for row in results["rows"] if row["growth"]]
    setting = results["setting"]
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"core_{what}_{setting['device']}.png" for what in ("time", "error")]
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        _time(growth, setting, files[0])
        _error(growth, setting, files[1])
    return files


def _time(growth: Rows, setting: dict[str, Any], file: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for contender, label in _contenders(growth).items():
        line = _line(growth, contender, HALF_TRAINED.name)
        pixels, median = [row["pixels"] for row in line], [row["median_ms"] for row in line]
        axes.fill_between(
            pixels,
            [_quantile(row, 0.25) for row in line],
            [_quantile(row, 0.75) for row in line],
            color=COLOURS[contender],
            alpha=0.2,
            linewidth=0,
        )
        axes.plot(pixels, median, "o-", color=COLOURS[contender], markersize=4, label=label)
    axes.set_title(f"Forward and backward, 3 classes, {HALF_TRAINED.name}\n{_machine(setting)}", fontsize=10)
    axes.set(ylabel="milliseconds (median; band: middle half)", yscale="log")
    _pixels(axes)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _error(growth: Rows, setting: dict[str, Any], file: Path) -> None:
    figure, both = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    drawn = {who: label for who, label in _contenders(growth).items() if who in ("OURS", "USUAL")}
    for axes, (column, (name, allowed)) in zip(both, ERRORS.items(), strict=True):
        for contender in drawn:
            for regime, marker in MARKERS.items():
                line = _line(growth, contender, regime)
                errors = [max(row[column], LEAST_ERROR) for row in line]
                axes.plot([row["pixels"] for row in line], errors, f"{marker}-", color=COLOURS[contender], markersize=4)
        axes.axhline(allowed, color="black", linestyle=":", linewidth=1)
        axes.set(title=f"Error of the {name}", ylabel="error against float64", yscale="log")
        _pixels(axes)
    handles = [Line2D([], [], color=COLOURS[contender], label=label) for contender, label in drawn.items()]
    handles += [Line2D([], [], color="gray", marker=m, markersize=4, label=regime) for regime, m in MARKERS.items()]
    handles.append(Line2D([], [], color="black", linestyle=":", linewidth=1, label="allowed for ours"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(_machine(setting), fontsize=10)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def _contenders(growth: Rows) -> dict[str, str]:
    """The labels of the contenders that were measured, in the order of the legend."""
    labels = {row["contender"]: row["label"] for row in growth}
    return {contender: labels[contender] for contender in COLOURS if contender in labels}


def _line(growth: Rows, contender: str, regime: str) -> Rows:
    line = [row for row in growth if row["contender"] == contender and row["regime"] == regime]
    return sorted(line, key=lambda row: int(row["pixels"]))


def _quantile(row: dict[str, Any], share: float) -> float:
    return float(np.quantile([call for block in row["blocks_ms"] for call in block], share))


def _machine(setting: dict[str, Any]) -> str:
    cores = f", {setting['cores']} cores" if setting["device"] == "cpu" else ""
    return f"{setting['chip']}{cores}, torch {setting['torch']}"


def _pixels(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlabel("pixels")
    axes.grid(which="major", color=palette.GRID, linewidth=0.6)


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    for file in draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])):
        print(f"drawn: {file}")


if __name__ == "__main__":
    main()
