"""Draws ``data_plane.png``: a large request by transport, and small requests by transport and size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

from benchmarks import palette
from benchmarks.remote.report import CORE
from benchmarks.workloads import HALF_TRAINED

COMPUTED, TRANSPORT, PEER = palette.OURS, palette.USUAL, palette.NEUTRAL


def draw(results: Mapping[str, Any], folder: Path) -> Path:
    """Writes ``data_plane.png`` into the folder, with what there is of both."""
    parts, setting = results["parts"], results["setting"]
    crossover = "unary" in parts
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "data_plane.png"
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(
            1,
            2 if crossover else 1,
            figsize=(12 if crossover else 7, 4.2),
            layout="constrained",
            squeeze=False,
            width_ratios=[3, 2] if crossover else [1],
        )
        _bars(axes[0, 0], parts["large"]["rows"])
        if crossover:
            _small(axes[0, 1], parts)
        figure.suptitle(f"{setting['chip']}, {setting['cores']} cores, loopback", fontsize=10)
        figure.savefig(file, dpi=120)
        plt.close(figure)
    return file


def _bars(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    rows = [row for row in rows if row["regime"] == HALF_TRAINED.name]
    core = next(row["median_ms"] for row in rows if row["contender"] == CORE)
    usual, *drawn = rows
    names = [row["contender"] for row in drawn]
    computed = [_computed(row, core) for row in drawn]
    moved = [max(0.0, row["transport_ms"] or 0.0) for row in drawn]
    peer = [row["median_ms"] if row["contender"].startswith("sockets") else 0 for row in drawn]
    axes.barh(names, computed, color=COMPUTED, label="computation")
    axes.barh(names, moved, left=computed, color=TRANSPORT, label="transport")
    axes.barh(names, peer, color=PEER, label="the same bytes over plain sockets")
    for place, row in enumerate(drawn):
        axes.errorbar(
            row["median_ms"],
            place,
            xerr=[
                [row["median_ms"] - row["lower_quartile_ms"]],
                [row["upper_quartile_ms"] - row["median_ms"]],
            ],
            color="black",
            linewidth=1,
            capsize=2,
        )
        axes.annotate(
            f"{row['median_ms']:.0f}",
            (row["upper_quartile_ms"], place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
        )
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("milliseconds, forward and backward (median; line: middle half)")
    axes.set_title(
        f"1x19x512x1024, {HALF_TRAINED.name}\n{usual['contender']}: {usual['median_ms']:.0f} ms, beyond the axis",
        fontsize=10,
    )
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.14), ncols=3, fontsize=8)


def _computed(row: Mapping[str, Any], core: float) -> float:
    if row["contender"].startswith("sockets"):
        return 0.0
    return float(row["median_ms"] if row["transport_ms"] is None else min(core, row["median_ms"]))


def _small(axes: Any, parts: Mapping[str, Any]) -> None:
    lines = (
        ("unary", "message_ms", "TCP, one message", TRANSPORT, "o-"),
        ("unary", "other_ms", "TCP, stream", TRANSPORT, "s--"),
        ("shared", "message_ms", "Unix socket, one message", COMPUTED, "o-"),
        ("shared", "other_ms", "shared memory", COMPUTED, "s--"),
    )
    for key, column, name, colour, style in lines:
        rows = parts[key]["rows"]
        sizes = [row["payload_bytes"] / 1e6 for row in rows]
        axes.plot(sizes, [row[column] for row in rows], style, color=colour, markersize=4, label=name)
    axes.set(xscale="log", yscale="log", xlabel="payload of the request, MB", ylabel="milliseconds (median)")
    low, high = axes.get_ylim()
    axes.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 4])
    axes.set_yticks([tick for tick in (0.5, 1, 2, 5, 10, 20, 50) if low <= tick <= high])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_title("Transports of small requests, cross-entropy", fontsize=10)
    axes.grid(which="major", color=palette.GRID, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
