"""How far loss and gradient by counting are from exact ones, over the number of bins of a table.

PYTHONPATH=proto:client:server .venv/bin/python benchmarks/bins_error.py

A second writing of docs/mathematics.md, section 11, in NumPy and float64, in which the number of bins is a parameter.
It is compared with section 7's closed form after a sort of the same float32 errors, and so are the bins' means of g
alone, without the slope in a bin. The gradient is that in the logits.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.lines import Line2D
from plots import COLOURS, ERRORS, MARKERS
from workloads import REGIMES, Regime, Workload

from lovasz.core import bins

Floats = npt.NDArray[np.float64]

WORKLOADS = {"19 classes, 512x1024": Workload((1, 19, 512, 1024)), "2 classes, 512x512": Workload((1, 2, 512, 512))}
QUICK = {"19 classes, 64x128": Workload((1, 19, 64, 128)), "2 classes, 64x64": Workload((1, 2, 64, 64))}
MANTISSA_BITS = 23


class Row(NamedTuple):
    """Errors are relative, the gradient's to its norm; ``means_error`` is the gradient's without the slope."""

    workload: str
    regime: str
    max_bits: int
    bins: int
    grad_error: float
    means_error: float
    loss_error: float


class Layout:
    """The bins of :mod:`lovasz.core.bins` with another ``MAX_BITS``.

    Of each bin: ``upper``, the error (in the mean) of pixels whose rest is 0; ``unit``, the width of a rest of 1.
    """

    def __init__(self, max_bits: int) -> None:
        octaves = np.arange(bins.OCTAVES)
        bits = np.maximum(bins.MIN_BITS, max_bits - octaves // bins.OCTAVES_PER_BIT)
        sizes = 1 << bits
        first = np.append(0, np.cumsum(sizes))
        # Of each octave; what lies below the last one is one bin.
        self._first, self._shift = first.astype(np.int32), np.append(MANTISSA_BITS - bits, 0).astype(np.int32)
        lower = 2.0 ** (bins.SOFTMAX_TOP - octaves)
        ulp, width = lower / (1 << MANTISSA_BITS), np.repeat(lower / sizes, sizes)
        floats_in_a_rest = 1 << np.maximum(MANTISSA_BITS - bits - bins.REST_BITS, 0)
        largest = np.repeat(2 * lower - ulp - (floats_in_a_rest - 1) / 2 * ulp, sizes)
        self.upper = np.append(largest - (np.arange(first[-1]) - np.repeat(first[:-1], sizes)) * width, 0.0)
        self.unit = np.append(width / (1 << bins.REST_BITS), 0.0)

    def places(self, errors: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """The bin and the rest of each error."""
        largest = np.int32(((bins.SOFTMAX_TOP + 128) << MANTISSA_BITS) - 1)
        # All that is below the last octave is at its upper end.
        distance = np.minimum(largest - errors.view(np.int32), np.int32(bins.OCTAVES << MANTISSA_BITS))
        octave, inside = distance >> MANTISSA_BITS, distance & ((1 << MANTISSA_BITS) - 1)
        shift = self._shift[octave]
        below = inside & ((np.int32(1) << shift) - np.int32(1))
        return self._first[octave] + (inside >> shift), (below << bins.REST_BITS) >> shift


class Segment:
    """One class: its foreground, and background to below the last foreground's bin; the rest has g = 0."""

    def __init__(self, errors: npt.NDArray[np.float32], foreground: npt.NDArray[np.bool_]) -> None:
        least = float(errors[foreground].min()) / 2
        self.pixels = np.flatnonzero(foreground | (errors >= (least if least >= 2.0**-60 else 0.0)))
        self._errors, self._foreground = errors[self.pixels], foreground[self.pixels]
        self.sign = np.where(self._foreground, -1.0, 1.0)
        # Foreground comes first in a tie, then the order of the pixels.
        order = np.lexsort((~self._foreground, -self._errors))
        ranked = self._foreground[order].astype(np.float64)
        left, union = ranked.sum() - np.cumsum(ranked) + ranked, ranked.sum() + np.cumsum(1 - ranked)
        self.g = np.empty(len(order))
        self.g[order] = np.where(ranked > 0, 1 / union, left / (union * np.maximum(union - 1, 1)))
        self.loss = float(self._errors.astype(np.float64) @ self.g)

    def counted(self, layout: Layout) -> tuple[Floats, Floats, float]:
        """g of each pixel, the mean g of its bin, and the loss."""
        n = len(layout.upper)
        place, rest = layout.places(self._errors)
        place += np.int32(n) * self._foreground
        counts = np.bincount(place, minlength=2 * n).reshape(2, n).astype(np.float64)
        rests = np.bincount(place, rest, minlength=2 * n).reshape(2, n)
        background, foreground = counts
        total = foreground.sum()
        left, union = total - np.cumsum(foreground) + foreground, total + np.cumsum(background) - background
        x, y = 1 / union, 1 / (union + background)
        mean = np.stack([(left - foreground / 2) * x * y, (x + y) / 2])
        drop = np.stack([np.minimum(left * x**2 - (left - foreground) * y**2, 2 * mean[0]), x - y])
        loss = float((mean * (counts * layout.upper - rests * layout.unit)).sum())
        slope, mean_rest = (drop / (1 << bins.REST_BITS)).ravel(), (rests / np.maximum(counts, 1)).ravel()
        means = mean.ravel()[place]
        return means + slope[place] * (mean_rest[place] - rest), means, loss


def norm_in_logits(errors: Floats, labels: npt.NDArray[np.int64], h: Floats) -> float:
    """The norm of the way back through softmax, section 8, of derivatives in the probabilities. Overwrites ``h``."""
    if not h.any():
        return 0.0
    own, wrong = np.take_along_axis(h, labels, 0), np.take_along_axis(errors, labels, 0)
    np.put_along_axis(h, labels, 0.0, 0)
    others = np.einsum("cp,cp->p", errors, h)[None]
    h -= others + (1 - wrong) * own
    h *= errors
    np.put_along_axis(h, labels, (1 - wrong) * (own * wrong - others), 0)
    return float(np.linalg.norm(h))


def measure(name: str, workload: Workload, regime: Regime, all_bits: list[int]) -> list[Row]:
    ((logits, target),) = workload.inputs(regime, torch.device("cpu"))
    index = target.unsqueeze(1)
    softmax = torch.softmax(logits, 1)
    wrong = softmax.scatter(1, index, 0.0).sum(1, keepdim=True)
    errors = softmax.scatter(1, index, wrong).transpose(0, 1).reshape(workload.classes, -1).numpy()
    labels = target.reshape(1, -1).numpy()
    # The mean over the classes present would divide loss and gradient alike, and is left out.
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
    """Errors of 0, and those that are rounding, are not drawn."""
    colours = dict(zip(dict.fromkeys(row.workload for row in rows), (COLOURS["OURS"], COLOURS["USUAL"]), strict=True))
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, both = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
        curves = ((both[0], "grad_error", "-"), (both[0], "means_error", "--"), (both[1], "loss_error", "-"))
        for (name, colour), (regime, marker) in itertools.product(colours.items(), MARKERS.items()):
            line = [row for row in rows if (row.workload, row.regime) == (name, regime)]
            for axes, column, style in curves:
                shown = [row for row in line if getattr(row, column) > 1e-14]
                at, errors = [row.bins for row in shown], [getattr(row, column) for row in shown]
                alpha = 0.5 if style == "--" else 1.0
                axes.plot(at, errors, marker + style, color=colour, markersize=3, linewidth=1.2, alpha=alpha)
        for axes, column in zip(both, ("grad_error", "loss_error"), strict=True):
            what, allowed = ERRORS[column]
            limit = axes.axhline(allowed, color="black", linestyle=":", linewidth=1, label="allowed")
            used = axes.axvline(bins.BINS, color="#8a8a8a", linewidth=1, label="bins in use")
            axes.set_xscale("log", base=2)
            axes.set(title=f"Error of the {what}", xlabel="bins", ylabel="error against a sort", yscale="log")
            axes.grid(which="major", color="#dddddd", linewidth=0.6)
        handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
        handles += [Line2D([], [], color="gray", marker=m, markersize=4, label=regime) for regime, m in MARKERS.items()]
        handles.append(Line2D([], [], color="gray", linestyle="--", alpha=0.5, label="without the slope in a bin"))
        figure.legend(handles=[*handles, limit, used], loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small inputs and few numbers of bins")
    parser.add_argument("--output", type=Path, default=Path("docs/figures/bins_error.png"), help="the plot")
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
