"""Lets packages be imported whose compiled operators are not there; what would call one fails.

PyPI's torchvision has operators for torch with CUDA, which do not load into torch's CPU build. mmcv-lite has none, but
mmsegmentation imports their Python side. The tests of the trainers' frameworks call none of them.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch

_DECLARED: list[torch.library.Library] = []
"""A library's declarations end with it."""


class _Absent(ModuleType):
    """mmcv's compiled module: has every function, and each fails."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)

        def fail(*arguments: object, **options: object) -> NoReturn:
            raise NotImplementedError(f"mmcv._ext.{name}: mmcv-lite has no compiled operators")

        return fail


def declare() -> None:
    """Declares them, where they are missing; before the packages are imported."""
    if not _DECLARED and _do_not_load("torchvision"):
        _DECLARED.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _DECLARED[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    if _is_installed("mmcv-lite"):
        sys.modules["mmcv._ext"] = _Absent("mmcv._ext")


def _do_not_load(package: str) -> bool:
    """Whether a package is installed whose operators do not load."""
    spec = find_spec(package)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for library in (found for folder in folders for found in Path(folder).glob("_C*.so")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return True
    return False


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
