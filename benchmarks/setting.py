"""The setting of a measurement: what its figures depend on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from benchmarks import usual


def cpu_setting(repeats: int) -> dict[str, Any]:
    """Machine and versions, for the JSON of a benchmark on the CPU."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": "cpu",
        "chip": _chip(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": version("numba"),
        "triton": version("triton"),
        "usual implementation": usual_implementation(),
        "repeats": repeats,
    }


def usual_implementation() -> str:
    return f"{usual.NAME} {found}" if (found := version(usual.NAME)) else "not installed"


def lines(setting: dict[str, Any]) -> str:
    """A setting as it is printed: a line for each value that is known."""
    return "\n".join(f"{name}: {value}" for name, value in setting.items() if value is not None)


def version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _chip() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in found if line.startswith("model name"))
    return next(names, platform.processor())
