"""Every way to compute a loss: a device, a backend, and how that backend ranks pixels."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch

from lovasz.core.dispatch import Backend, installed

SORTED_BELOW_PIXELS = 1 << 18
"""Groups of at least so many pixels are counted in tables on a CPU, unless few pixels come before the last foreground;
on a GPU, their pixels are not all ranked."""
MAY_BE_COUNTED_PIXELS = 3 << 15
"""Smaller groups are always sorted on a CPU."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's kernels run on a CPU under its interpreter, if this is set before triton is first imported."""

INTERPRETED_ELEMENTS = 1 << 15
"""More logits than these take the interpreter too long."""


@dataclass(frozen=True)
class Way:
    """A device and the backend that computes all float32 and 16-bit losses on it; float64 always takes torch's.

    Attributes:
        ranks: how a compiled backend ranks pixels, whatever the size of their group; None: as it does by itself.
    """

    device: str
    backend: Backend
    ranks: Literal["by sorting", "in buckets", "in tables"] | None = None

    def __str__(self) -> str:
        ranks = "" if self.ranks is None else f"-{self.ranks.split()[-1]}"
        return f"{self.device}-{self.backend.name.lower()}{ranks}"

    def counts(self, pixels: int) -> bool:
        """Whether groups of so many pixels are counted in tables, where a bin is one tie, shared evenly."""
        if self.backend is Backend.TRITON:
            from lovasz.core.backends.triton.tables import CROWD

            # Where pixels are ranked in buckets, those of a crowded bin are not.
            return pixels > {"in tables": 0, "in buckets": CROWD.value, None: SORTED_BELOW_PIXELS - 1}[self.ranks]
        if self.backend is Backend.TORCH or self.ranks == "by sorting":
            return False
        return self.ranks == "in tables" or pixels >= MAY_BE_COUNTED_PIXELS

    def force(self, patch: pytest.MonkeyPatch) -> None:
        """Lets the backend rank as this way has it."""
        if self.backend is Backend.NUMBA and self.ranks is not None:
            rank_on_cpu(self.ranks, patch)
        if self.backend is not Backend.TRITON:
            return
        from lovasz.core.backends.triton import bins, layout
        from lovasz.core.backends.triton import compute as triton_compute

        patch.setattr(triton_compute, "_programs", OrderedDict())
        if self.is_interpreted:
            import triton.language

            patch.setattr(triton.language, "sort", _sorted_by_numpy)
        if self.ranks is not None:
            patch.setattr(layout, "SORTED_PIXELS", 0)
        if self.ranks == "in tables":
            patch.setattr(bins, "FULL_PIXELS", 1)
            for name in ("RANKED_PIXELS", "RANKED_ELEMENTS", "RANKED_FOREGROUND"):
                patch.setattr(layout, name, 0)

    @property
    def needs(self) -> str | None:
        """What is missing here to take this way; None if nothing is."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "an NVIDIA GPU"
        if self.backend is Backend.NUMBA and not installed("numba"):
            return "numba (the extra cpu)"
        if self.backend is Backend.TRITON and not installed("triton"):
            return "triton, which comes with torch for CUDA"
        if self.backend is Backend.TRITON and (self.device == "cpu") != INTERPRETED:
            return f"a run {'without' if INTERPRETED else 'with'} TRITON_INTERPRET=1 (make interpret)"
        return None

    @property
    def is_interpreted(self) -> bool:
        return (self.device, self.backend) == ("cpu", Backend.TRITON)

    def require_ranks_of_rare_classes(self) -> None:
        """Skips the test on a way that no backend takes by itself: a class of few pixels in a table alone."""
        if self.backend is Backend.TRITON and self.ranks == "in tables":
            pytest.skip("classes of few pixels are ranked")

    def require_speed(self, elements: int) -> None:
        """Skips the test if so many logits would take this way too long."""
        if self.is_interpreted and elements > INTERPRETED_ELEMENTS:
            pytest.skip("too large for Triton's interpreter")


def rank_on_cpu(ranks: str, patch: pytest.MonkeyPatch) -> None:
    """Lets the CPU's backend rank all pixels "by sorting" or "in tables"."""
    from lovasz.core.backends.numba import extension

    thresholds = {"by sorting": extension.SORT_ALL, "in tables": extension.COUNT_ALL}
    patch.setattr(extension, "THRESHOLDS", thresholds[ranks])


def _sorted_by_numpy(keys: Any, descending: bool) -> Any:
    """Triton's sort in one step: its own takes the interpreter seconds, by dozens of steps for each program."""
    import triton.language
    from triton.runtime.interpreter import TensorHandle

    values = np.sort(keys.handle.data)
    return triton.language.core.tensor(
        TensorHandle(values[::-1].copy() if descending else values, keys.handle.dtype), keys.type
    )


NUMBA = Way("cpu", Backend.NUMBA)
NUMBA_SORTED = Way("cpu", Backend.NUMBA, "by sorting")
NUMBA_TABLES = Way("cpu", Backend.NUMBA, "in tables")
_ALL_WAYS = [
    Way("cpu", Backend.TORCH),
    NUMBA,
    NUMBA_SORTED,
    NUMBA_TABLES,
    Way("cpu", Backend.TRITON),
    Way("cpu", Backend.TRITON, "in buckets"),
    Way("cpu", Backend.TRITON, "in tables"),
    Way("cuda", Backend.TORCH),
    Way("cuda", Backend.TRITON),
    Way("cuda", Backend.TRITON, "in buckets"),
    Way("cuda", Backend.TRITON, "in tables"),
]

WAYS = [way for way in _ALL_WAYS if way.needs is None]
"""Those that can be taken here. Thousands of tests of the others, each skipped, would take half a minute."""

MISSING_WAYS = {str(way): way.needs for way in _ALL_WAYS if way.needs is not None}
