"""Measures and draws the errors of loss and gradient by counting, over the number of bins of a table.

    python -m benchmarks.bins

Counting (benchmarks/bins/counting.py), with and without the slope in a bin, is compared with the closed form of
docs/mathematics.md, section 7, after a sort of the same float32 errors. The gradient is that in the logits.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.lines import Line2D

from benchmarks import palette
from benchmarks.bins.counting import Layout, Segment, norm_in_logits
from benchmarks.palette import MARKERS
from benchmarks.truth import GRAD_ERROR_ALLOWED, LOSS_ERROR_ALLOWED
from benchmarks.workloads import REGIMES, Regime, Workload
from lovasz.core.backends.numba import bins

WORKLOADS = {"19 classes, 512x1024": Workload((1, 19, 512, 1024)), "2 classes, 512x512": Workload((1, 2, 512, 512))}
QUICK = {"19 classes, 64x128": Workload((1, 19, 64, 128)), "2 classes, 64x64": Workload((1, 2, 64, 64))}
ERRORS = {
    "grad_error": ("gradient, relative to its norm", GRAD_ERROR_ALLOWED),
    "loss_error": ("loss, relative", LOSS_ERROR_ALLOWED),
}
LEAST_ERROR = 1e-14
"""Smaller errors are rounding, and are not drawn."""


class Row(NamedTuple):
    """One regime with one number of bins. Errors are relative, those of the gradient to its norm.

    Attributes:
        means_error: the error of the gradient without the slope in a bin.
    """

    workload: str
    regime: str
    max_bits: int
    bins: int
    grad_error: float
    means_error: float
    loss_error: float


def measure(name: str, workload: Workload, regime: Regime, all_bits: list[int]) -> list[Row]:
    ((logits, target),) = workload.inputs(regime)
    index = target.unsqueeze(1)
    softmax = torch.softmax(logits, 1)
    wrong = softmax.scatter(1, index, 0.0).sum(1, keepdim=True)
    errors = softmax.scatter(1, index, wrong).transpose(0, 1).reshape(workload.classes, -1).numpy()
    labels = target.reshape(1, -1).numpy()
    # Not divided by the number of classes present, which would divide loss and gradient alike.
    segments = {c: Segment(errors[c], labels[0] == c) for c in np.unique(labels).tolist()}
    errors = errors.astype(np.float64)
    sloped, flat = np.zeros((2, *errors.shape))
    for c, exact in segments.items():
        sloped[c, exact.pixels] = exact.sign * exact.g
    exact_loss, exact_norm = sum(exact.loss for exact in segments.values()), norm_in_logits(errors, labels, sloped)
    rows = []
    for max_bits in all_bits:
        layout, loss, sloped[:], flat[:] = Layout(max_bits), 0.0, 0.0, 0.0
        for c, exact in segments.items():
            g, means, own_loss = exact.counted(layout)
            sloped[c, exact.pixels] = exact.sign * (g - exact.g)
            flat[c, exact.pixels] = exact.sign * (means - exact.g)
            loss += own_loss
        grad_error, means_error = (norm_in_logits(errors, labels, h) / exact_norm for h in (sloped, flat))
        loss_error = abs(loss / exact_loss - 1)
        rows.append(Row(name, regime.name, max_bits, len(layout.upper), grad_error, means_error, loss_error))
    return rows


def draw(rows: list[Row], file: Path) -> None:
    colours = dict(zip(dict.fromkeys(row.workload for row in rows), (palette.OURS, palette.USUAL), strict=True))
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, both = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
        curves = ((both[0], "grad_error", "-"), (both[0], "means_error", "--"), (both[1], "loss_error", "-"))
        for (name, colour), (regime, marker) in itertools.product(colours.items(), MARKERS.items()):
            line = [row for row in rows if (row.workload, row.regime) == (name, regime)]
            for axes, column, style in curves:
                shown = [row for row in line if getattr(row, column) > LEAST_ERROR]
                at, errors = [row.bins for row in shown], [getattr(row, column) for row in shown]
                alpha = 0.5 if style == "--" else 1.0
                axes.plot(at, errors, marker + style, color=colour, markersize=3, linewidth=1.2, alpha=alpha)
        for axes, (what, allowed) in zip(both, ERRORS.values(), strict=True):
            limit = axes.axhline(allowed, color="black", linestyle=":", linewidth=1, label="allowed")
            used = axes.axvline(bins.BINS, color=palette.NEUTRAL, linewidth=1, label="finer bins of a CPU")
            axes.set_xscale("log", base=2)
            axes.set(title=f"Error of the {what}", xlabel="bins", ylabel="error against a sort", yscale="log")
            axes.grid(which="major", color=palette.GRID, linewidth=0.6)
        handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
        handles += [Line2D([], [], color="gray", marker=m, markersize=4, label=regime) for regime, m in MARKERS.items()]
        handles.append(Line2D([], [], color="gray", linestyle="--", alpha=0.5, label="without the slope in a bin"))
        figure.legend(handles=[*handles, limit, used], loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small inputs and few numbers of bins")
    parser.add_argument(
        "--output", type=Path, default=Path("docs/figures/bins_error.png"), help="where to write the plot"
    )
    arguments = parser.parse_args()
    workloads, all_bits = (QUICK, [8, 12, bins.MAX_BITS]) if arguments.quick else (WORKLOADS, list(range(8, 19)))
    rows: list[Row] = []
    print("| inputs | regime | MAX_BITS | bins | gradient | without the slope | loss |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for (name, workload), regime in itertools.product(workloads.items(), REGIMES):
        measured = measure(name, workload, regime, all_bits)
        rows += measured
        for row in measured:
            print(f"| {' | '.join([*map(str, row[:4]), *(f'{error:.1e}' for error in row[4:])])} |", flush=True)
    draw(rows, arguments.output)
    print(f"drawn: {arguments.output}")


if __name__ == "__main__":
    main()
