"""Runs each test of the core on every way to compute a loss, so that what holds on one of them has to hold on all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from support.ways import WAYS, Way

from lovasz.core import dispatch
from lovasz.core.batch import Request
from lovasz.core.dispatch import Backend, installed
from lovasz.spec import WeightedSum

collect_ignore = [] if installed("numba") else ["test_numba_kernels.py", "test_process_group.py", "test_whole.py"]


def _parameter(way: Way) -> object:
    return pytest.param(way, id=str(way), marks=[pytest.mark.gpu] if way.device == "cuda" else [])


# Not of the session: the fixture would be in force until its end, also for tests that do not ask for it.
@pytest.fixture(scope="module", params=[_parameter(way) for way in WAYS])
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    """A way that all losses take for as long as the fixture is used."""
    way: Way = request.param

    def forced(asked: Sequence[Request], loss: WeightedSum, on: torch.device) -> Backend:
        return Backend.TORCH if asked[0].logits.dtype == torch.float64 else way.backend

    # The interpreter computes with NumPy, which warns of divisions whose results kernels then pass over.
    quiet = np.errstate(all="ignore") if way.backend is Backend.TRITON else nullcontext()
    with pytest.MonkeyPatch.context() as patch, quiet:
        patch.setattr(dispatch, "choose", forced)
        way.force(patch)
        yield way


@pytest.fixture(scope="module")
def device(way: Way) -> torch.device:
    """The device of each way; all losses take its backend."""
    return torch.device(way.device)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Drops the cases in float64 of all backends but torch's, which computes them on all."""

    def repeats(item: pytest.Item) -> bool:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        way = parameters.get("way")
        return isinstance(way, Way) and way.backend is not Backend.TORCH and parameters.get("dtype") == torch.float64

    items[:] = [item for item in items if not repeats(item)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are faster on one thread, above all where others use the machine; test_batch.py takes more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Batches of any size get as many threads as torch has; puts torch's number back."""
    if installed("numba"):
        from lovasz.core.backends.numba import extension

        monkeypatch.setattr(extension, "THRESHOLDS", extension.THRESHOLDS._replace(thread=1))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
