"""Draws ``lovasz_extension.png``, the first figure of docs/mathematics.md.

.venv/bin/python docs/figures/draw.py    # make figures
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from lovasz.core.reference import jaccard_along_order, lovasz_extension, lovasz_grad

OUTPUT = Path(__file__).parent / "lovasz_extension.png"

FOREGROUND, BACKGROUND, CROSS_ENTROPY = "#d1602f", "#4178a4", "#8a8a8a"
SURFACE = "viridis"

# The worked example of docs/mathematics.md: eight pixels in descending order of their errors.
ERRORS = np.array([0.9, 0.8, 0.65, 0.5, 0.4, 0.3, 0.2, 0.1])
IS_FOREGROUND = np.array([0, 1, 0, 1, 0, 1, 0, 0], dtype=bool)
G = ["1/4", "1/4", "1/10", "1/5", "1/30", "1/6", "0", "0"]

# Two pixels, the first foreground, the second background: the Jaccard loss of each set of wrong ones.
TWO_PIXELS = torch.tensor([True, False])
VERTICES = {(0, 0): ("nothing wrong", "0"), (1, 0): ("1 wrong", "1"), (0, 1): ("2 wrong", "1/2"), (1, 1): ("both", "1")}


def extension_on_the_square(steps: int) -> tuple[npt.NDArray[np.float64], ...]:
    """The errors m1 and m2 over the unit square, and the Lovász extension at each."""
    axis = np.linspace(0.0, 1.0, steps)
    m1, m2 = np.meshgrid(axis, axis)
    values = [lovasz_extension(torch.tensor(m), TWO_PIXELS).item() for m in zip(m1.flat, m2.flat, strict=True)]
    return m1, m2, np.array(values).reshape(m1.shape)


def draw_surface(axes: Any) -> None:
    m1, m2, values = extension_on_the_square(steps=21)
    axes.plot_surface(m1, m2, values, cmap=SURFACE, vmin=0, vmax=1, alpha=0.8, rstride=1, cstride=1, linewidth=0)
    axes.plot([0, 1], [0, 1], [0, 1], color="black", linewidth=1.2, zorder=10)
    for (x, y), (_, value) in VERTICES.items():
        z = lovasz_extension(torch.tensor([x, y], dtype=torch.float64), TWO_PIXELS).item()
        axes.plot([x, x], [y, y], [0, z], color="black", linewidth=0.9, linestyle=":", zorder=11)
        axes.plot([x], [y], [z], "o", color="black", markersize=5, zorder=12)
        # The surface rises from the origin towards the reader's eye: its label goes beside the corner.
        aside = 0.14 if z == 0 else 0.0
        axes.text(x, y + aside, z + 0.09 - aside, value, ha="center", fontsize=11, fontweight="bold", zorder=13)
    axes.set(xlabel="$m_1$ (foreground)", ylabel="$m_2$ (background)", zlim=(0, 1.1))
    for set_ticks in (axes.set_xticks, axes.set_yticks, axes.set_zticks):
        set_ticks([0, 0.5, 1])
    axes.tick_params(pad=0)
    axes.view_init(elev=24, azim=-122)
    axes.set_box_aspect((1, 1, 0.72), zoom=1.06)


def draw_contours(axes: Axes) -> None:
    m1, m2, values = extension_on_the_square(steps=101)
    axes.contourf(m1, m2, values, levels=np.linspace(0, 1, 11), cmap=SURFACE, alpha=0.8)
    lines = axes.contour(m1, m2, values, levels=np.linspace(0.1, 0.9, 9), colors="black", linewidths=0.6)
    labelled = [0.2, 0.4, 0.6, 0.8]
    axes.clabel(lines, labelled, fontsize=8.5, fmt="%.1f", manual=[(v - 0.1, v + 0.1) for v in labelled])
    axes.plot([0, 1], [0, 1], color="black", linewidth=1.2)
    for (x, y), (name, value) in VERTICES.items():
        axes.plot([x], [y], "o", color="black", markersize=6, clip_on=False, zorder=5)
        axes.annotate(
            f"{name}: {value}",
            (x, y),
            xytext=(0, -22 if y == 0 else 8),
            textcoords="offset points",
            ha="center",
            va="top" if y == 0 else "bottom",
            annotation_clip=False,
        )
    box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "alpha": 0.85, "edgecolor": "none"}
    axes.text(0.7, 0.28, "$m_1 > m_2$:\n$g = (1,\\ 0)$", ha="center", va="center", bbox=box)
    axes.text(0.27, 0.82, "$m_2 > m_1$:\n$g = (1/2,\\ 1/2)$", ha="center", va="center", bbox=box)
    axes.set(xticks=[0, 0.5, 1], yticks=[0, 0.5, 1], aspect="equal")
    axes.set_xlabel("$m_1$ (foreground)", labelpad=4)
    axes.set_ylabel("$m_2$ (background)")


def draw_order(axes: Axes) -> None:
    colours = np.where(IS_FOREGROUND, FOREGROUND, BACKGROUND)
    rank = 1.0 + np.arange(len(ERRORS))
    jaccard = jaccard_along_order(torch.from_numpy(IS_FOREGROUND).double()).numpy()
    before = np.concatenate([[0.0], jaccard[:-1]])
    axes.step([0.5, *(rank + 0.5)], [0, *jaccard], where="pre", color="black", linewidth=1)
    axes.bar(rank, jaccard - before, bottom=before, width=1, color=colours, alpha=0.85)
    for x, low, high, text in zip(rank, before, jaccard, G, strict=True):
        inside = high - low > 0.08
        axes.text(
            x, (low + high) / 2 if inside else high + 0.02, text, ha="center", va="center" if inside else "bottom"
        )
    axes.set(xlim=(0.5, 8.5), ylim=(0, 1.12), xticks=rank, yticks=[0, 0.25, 0.5, 0.75, 1])
    axes.set_xticklabels([f"{k:g}\n{m:g}" for k, m in zip(rank, ERRORS, strict=True)])
    axes.set_xlabel("rank and error $m$ of the pixel")
    axes.set_ylabel("Jaccard loss with the first pixels wrong")
    axes.legend(handles=[Patch(color=FOREGROUND, label="foreground"), Patch(color=BACKGROUND, label="background")])


def draw_shares(axes: Axes) -> None:
    rank = 1.0 + np.arange(len(ERRORS))
    g = lovasz_grad(torch.from_numpy(IS_FOREGROUND).double()).numpy()
    # Cross-entropy is the mean of -log(1 - m), whose derivative in m is 1 / (1 - m) over the number of pixels.
    cross_entropy = 1 / (1 - ERRORS)
    colours = np.where(IS_FOREGROUND, FOREGROUND, BACKGROUND)
    axes.bar(rank - 0.2, 100 * g, width=0.38, color=colours, alpha=0.85)
    axes.bar(rank + 0.2, 100 * cross_entropy / cross_entropy.sum(), width=0.38, color=CROSS_ENTROPY, alpha=0.85)
    axes.set(xlim=(0.5, 8.5), xticks=rank)
    axes.set_xticklabels([f"{k:g}\n{m:g}" for k, m in zip(rank, ERRORS, strict=True)])
    axes.set_xlabel("rank and error $m$ of the pixel")
    axes.set_ylabel("share of the sum of dloss/d$m$, %")
    axes.legend(
        handles=[
            Patch(color=FOREGROUND, label="Lovász, foreground"),
            Patch(color=BACKGROUND, label="Lovász, background"),
            Patch(color=CROSS_ENTROPY, label="cross-entropy"),
        ],
        frameon=False,
    )


def main() -> None:
    """Writes the figure."""
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(11, 9.4))
    surface = figure.add_axes((0.0, 0.53, 0.5, 0.42), projection="3d")
    contours = figure.add_axes((0.57, 0.585, 0.4, 0.325))
    order = figure.add_axes((0.07, 0.075, 0.41, 0.37))
    shares = figure.add_axes((0.57, 0.075, 0.41, 0.37))
    draw_surface(surface)
    draw_contours(contours)
    draw_order(order)
    draw_shares(shares)
    for x, y, text in (
        (0.03, 0.965, "a   The Jaccard loss lives on the corners;\n     the Lovász extension joins them, convexly"),
        (
            0.54,
            0.965,
            "b   The same from above: one linear piece for each\n     order of the errors, a crease where they tie",
        ),
        (0.03, 0.475, "c   Eight pixels turn wrong, largest error first:\n     the steps of the Jaccard loss are g"),
        (
            0.54,
            0.475,
            "d   What the loss asks of each pixel: g looks at the\n     set, cross-entropy at the pixel's error alone",
        ),
    ):
        figure.text(x, y, text, fontsize=11.5, va="center", linespacing=1.35)
    figure.savefig(OUTPUT, dpi=110, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
