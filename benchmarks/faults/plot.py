"""Draws ``faults.png``: the server's memory under the loads that last."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from benchmarks import palette


def draw(results: Mapping[str, Any], folder: Path) -> Path:
    """Writes ``faults.png`` into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    file, setting = folder / "faults.png", results["setting"]
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
        curves = [one for one in results["outcomes"] if one["curve"]]
        for one, colour in zip(curves, (palette.OURS, palette.USUAL, palette.NEUTRAL), strict=False):
            seconds, mib = zip(*one["curve"], strict=True)
            axes.plot([second / 60 for second in seconds], mib, color=colour, label=one["tried"])
        axes.set(xlabel="minutes", ylabel="resident memory of the server, MiB", ylim=(0, None))
        axes.grid(color=palette.GRID)
        if curves:
            axes.legend(frameon=False)
        figure.suptitle(f"{setting['chip']}, {setting['cores']} cores", fontsize=10)
        figure.savefig(file, dpi=120)
        plt.close(figure)
    return file
