"""Draws the first test canvases of segment_digits.py with the predictions of both networks."""

from __future__ import annotations

from pathlib import Path

import torch
from digit_scenes import CLASS_NAMES, CLASSES, VOID, Scenes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from training import Score

BACKGROUND_COLOUR = "#f4f4f2"
DIGIT_COLOURS = (
    *("#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f"),
    *("#edc948", "#b07aa1", "#ff9da7", "#9c755f", "#2f3e6b"),
)
VOID_COLOUR = "#c4c4c4"


def draw_figure(scenes: Scenes, baseline: Score, lovasz: Score, path: Path, canvases: int = 6) -> None:
    """Saves the first test canvases, one a column: image, truth and both predictions."""
    scenes = scenes.to(torch.device("cpu"))
    colours = [BACKGROUND_COLOUR, *DIGIT_COLOURS, VOID_COLOUR]
    void = scenes.labels == VOID
    rows = {
        "image": scenes.images[:, 0],
        "truth": scenes.labels.masked_fill(void, CLASSES),
        "cross-entropy": baseline.predictions.masked_fill(void, CLASSES),
        "+ Lovász-Softmax": lovasz.predictions.masked_fill(void, CLASSES),
    }
    figure = Figure(figsize=(1.6 * canvases + 0.4, 7.1), layout="constrained")
    axes = figure.subplots(len(rows), canvases, squeeze=False)
    for row, (title, maps) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(title, fontsize=11)
        for axis, shown in zip(row, maps, strict=False):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color(VOID_COLOUR)
            if shown.is_floating_point():
                axis.imshow(shown, cmap="gray", vmin=0.0, vmax=1.0)
            else:
                axis.imshow(shown, cmap=ListedColormap(colours), vmin=0, vmax=len(colours) - 1, interpolation="nearest")
    patches = [Patch(facecolor=colour, edgecolor=VOID_COLOUR) for colour in colours]
    names = [*CLASS_NAMES, "void (not counted)"]
    figure.legend(patches, names, loc="outside lower center", ncols=len(names), frameon=False, columnspacing=1.0)
    figure.suptitle(
        f"Test mIoU: {baseline.mean_iou:.3f} with cross-entropy, {lovasz.mean_iou:.3f} with Lovász-Softmax added"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
