"""The usual implementation of the Lovász losses: that of segmentation-models-pytorch (``requirements.txt``)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any

NAME = "segmentation-models-pytorch"
MODULE = "segmentation_models_pytorch"
MISSING = f"{NAME} is not installed: pip install --no-deps --requirement benchmarks/requirements.txt"


def installed() -> bool:
    return importlib.util.find_spec(MODULE) is not None


def losses() -> Any:
    """Imports ``segmentation_models_pytorch.losses`` alone.

    The losses need only torch; the package's top level imports torchvision and more. An empty module in its place,
    with the package's path, lets the losses be imported without it.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec(MODULE)
    if spec is None:
        raise ModuleNotFoundError(MISSING)
    empty = types.ModuleType(MODULE)
    empty.__path__ = list(spec.submodule_search_locations or [])
    empty.__spec__ = spec
    sys.modules[MODULE] = empty
    return importlib.import_module(f"{MODULE}.losses")
