"""Every way to compute a loss, so that what is held on one of them has to hold on all."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from conftest import require_gpu

from lovasz.core import batch
from lovasz.core.paths import Path, choose, installed
from lovasz.core.ragged import Request
from lovasz.spec import WeightedSum

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's kernels run on a CPU under its interpreter, if this is set before triton is first imported."""

WAYS = [
    ("cpu", Path.TORCH),
    ("cpu", Path.NUMBA),
    ("cpu", Path.NUMBA_SORTED),
    ("cpu", Path.NUMBA_TABLES),
    ("cuda", Path.TORCH),
    ("cuda", Path.TRITON),
]


def _parameter(device: str, path: Path) -> object:
    marks = [pytest.mark.gpu] if device == "cuda" else []
    return pytest.param((device, path), id=f"{device}-{path.name.lower()}", marks=marks)


@pytest.fixture(scope="session", params=[_parameter(*way) for way in WAYS])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device, on which all losses take one path for as long as the fixture is used (float64 always takes torch's)."""
    name, path = request.param
    if name == "cuda":
        require_gpu()
    if path.name.startswith("NUMBA") and not installed("numba"):
        pytest.skip("needs numba (the extra cpu)")

    def forced(asked: Request, loss: WeightedSum, on: torch.device) -> Path:
        return Path.TORCH if asked.logits.dtype == torch.float64 else path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "choose", forced)
        yield torch.device(name)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are faster on one thread, above all where others use the machine; test_batch.py takes more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
