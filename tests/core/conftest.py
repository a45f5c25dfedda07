"""Every way to compute a loss, so that what is held on one of them has to hold on all."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
from conftest import require_gpu

from lovasz.core import dispatch
from lovasz.core.batch import Request
from lovasz.core.bins import SORTED_BELOW_PIXELS
from lovasz.core.dispatch import Backend, installed
from lovasz.spec import WeightedSum

collect_ignore = [] if installed("numba") else ["test_numba_kernels.py"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's kernels run on a CPU under its interpreter, if this is set before triton is first imported."""

INTERPRETED_ELEMENTS = 1 << 15
"""More logits than these take the interpreter too long."""


@dataclass(frozen=True)
class Way:
    """A device and the path that all float32 and 16-bit losses take on it; float64 always takes torch's.

    Attributes:
        ranks: how the GPU's path ranks pixels, whatever the size of their group; None: as it does by itself.
    """

    device: str
    path: Backend
    ranks: Literal["in buckets", "in tables"] | None = None

    def __str__(self) -> str:
        ranks = "" if self.ranks is None else f"-{self.ranks.split()[-1]}"
        return f"{self.device}-{self.path.name.lower()}{ranks}"

    def counts(self, pixels: int) -> bool:
        """Whether groups of so many pixels are counted in tables, where a bin is one tie, shared evenly."""
        if self.path is Backend.TRITON:
            from lovasz.core.backends.triton.tables import CROWD

            # Where pixels are ranked in buckets, those of a crowded bin are not.
            return pixels > {"in tables": 0, "in buckets": CROWD.value, None: SORTED_BELOW_PIXELS - 1}[self.ranks]
        if self.path is Backend.NUMBA:
            return pixels >= SORTED_BELOW_PIXELS
        return self.path is Backend.NUMBA_TABLES

    def force(self, patch: pytest.MonkeyPatch) -> None:
        """Lets the GPU's path rank as this way has it."""
        if self.path is not Backend.TRITON:
            return
        from lovasz.core.backends.triton import bins, plan
        from lovasz.core.backends.triton import compute as triton_compute

        patch.setattr(triton_compute, "_plans", OrderedDict())
        if self.is_interpreted:
            import triton.language

            patch.setattr(triton.language, "sort", _sorted_by_numpy)
        if self.ranks is not None:
            patch.setattr(plan, "SORTED_PIXELS", 0)
        if self.ranks == "in tables":
            patch.setattr(bins, "FULL_PIXELS", 1)
            for name in ("RANKED_PIXELS", "RANKED_ELEMENTS", "RANKED_FOREGROUND"):
                patch.setattr(plan, name, 0)

    def require(self) -> None:
        """Skips the test where this way cannot be taken."""
        if self.device == "cuda":
            require_gpu()
        if self.path.name.startswith("NUMBA") and not installed("numba"):
            pytest.skip("needs numba (the extra cpu)")
        if self.path is Backend.TRITON:
            if not installed("triton"):
                pytest.skip("needs triton, which comes with torch for CUDA")
            if (self.device == "cpu") != INTERPRETED:
                pytest.skip(f"runs {'without' if INTERPRETED else 'with'} TRITON_INTERPRET=1 (make interpret)")

    @property
    def is_interpreted(self) -> bool:
        return (self.device, self.path) == ("cpu", Backend.TRITON)

    def require_ranks_of_rare_classes(self) -> None:
        """Skips the test on a way that the GPU's path never takes by itself: a class of few pixels in a table alone."""
        if self.ranks == "in tables":
            pytest.skip("classes of few pixels are ranked")

    def require_speed(self, elements: int) -> None:
        """Skips the test if so many logits would take this way too long."""
        if self.is_interpreted and elements > INTERPRETED_ELEMENTS:
            pytest.skip("too large for Triton's interpreter")


def _sorted_by_numpy(keys: Any, descending: bool) -> Any:
    """Triton's sort in one step: its own takes the interpreter seconds, by dozens of steps for each program."""
    import triton.language
    from triton.runtime.interpreter import TensorHandle

    values = np.sort(keys.handle.data)
    return triton.language.core.tensor(
        TensorHandle(values[::-1].copy() if descending else values, keys.handle.dtype), keys.type
    )


WAYS = [
    Way("cpu", Backend.TORCH),
    Way("cpu", Backend.NUMBA),
    Way("cpu", Backend.NUMBA_SORTED),
    Way("cpu", Backend.NUMBA_TABLES),
    Way("cpu", Backend.TRITON),
    Way("cpu", Backend.TRITON, "in buckets"),
    Way("cpu", Backend.TRITON, "in tables"),
    Way("cuda", Backend.TORCH),
    Way("cuda", Backend.TRITON),
    Way("cuda", Backend.TRITON, "in buckets"),
    Way("cuda", Backend.TRITON, "in tables"),
]


def _parameter(way: Way) -> object:
    return pytest.param(way, id=str(way), marks=[pytest.mark.gpu] if way.device == "cuda" else [])


# Not of the session: the fixture would be in force until its end, also for tests that do not ask for it.
@pytest.fixture(scope="module", params=[_parameter(way) for way in WAYS])
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    """A way that all losses take for as long as the fixture is used."""
    way: Way = request.param
    way.require()

    def forced(asked: Sequence[Request], loss: WeightedSum, on: torch.device) -> Backend:
        return Backend.TORCH if asked[0].logits.dtype == torch.float64 else way.path

    # The interpreter computes with NumPy, which warns of divisions whose results kernels then pass over.
    quiet = np.errstate(all="ignore") if way.path is Backend.TRITON else nullcontext()
    with pytest.MonkeyPatch.context() as patch, quiet:
        patch.setattr(dispatch, "choose", forced)
        way.force(patch)
        yield way


@pytest.fixture(scope="module")
def device(way: Way) -> torch.device:
    """The device of each way; all losses take its path."""
    return torch.device(way.device)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Drops the cases in float64 of all paths but torch's, which they would take again and again."""

    def repeats(item: pytest.Item) -> bool:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        way = parameters.get("way")
        return isinstance(way, Way) and way.path is not Backend.TORCH and parameters.get("dtype") == torch.float64

    items[:] = [item for item in items if not repeats(item)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are faster on one thread, above all where others use the machine; test_batch.py takes more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
