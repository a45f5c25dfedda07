"""The ways in which a batch can be computed, and which one a request takes."""

from __future__ import annotations

import enum
import importlib.util
from collections.abc import Sequence
from functools import cache

import torch

from lovasz.core import torch_path
from lovasz.core.bins import SORTED_BELOW_PIXELS
from lovasz.core.computed import Computed
from lovasz.core.ragged import Request
from lovasz.spec import CrossEntropy, LossLike, LovaszHinge, LovaszSoftmax, WeightedSum, weighted_sum


class Path(enum.Enum):
    """All give the same answers, up to rounding and to the width of the tables' bins (docs/mathematics.md)."""

    TORCH = "torch"
    """Sorts; any device and dtype. The only one for float64."""
    NUMBA = "numba"
    """Compiled, on the CPU: sorts small groups, counts large ones in tables."""
    NUMBA_SORTED = "numba, sorted"
    """The same, all groups sorted."""
    NUMBA_TABLES = "numba, tables"
    """The same, all groups counted."""
    TRITON = "triton"
    """Compiled, on a GPU (and on a CPU under Triton's interpreter): all groups counted."""


@cache
def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def choose(request: Request, loss: WeightedSum, device: torch.device) -> Path:
    """The fastest path for a request. Depends on the request alone, so that its answer does not depend on its batch."""
    if request.logits.dtype == torch.float64:
        return Path.TORCH
    if device.type == "cpu":
        return Path.NUMBA if installed("numba") else Path.TORCH
    if device.type == "cuda" and installed("triton") and _smallest_group(request, loss) >= SORTED_BELOW_PIXELS:
        return Path.TRITON
    return Path.TORCH


def _smallest_group(request: Request, loss: WeightedSum) -> int:
    """Pixels of the smallest group that is scored; 0 if none is, as for cross-entropy alone."""
    layout = request.layout
    sizes = [
        layout.pixels if term.per_image else layout.images * layout.pixels
        for _, term in loss.terms
        if not isinstance(term, CrossEntropy)
    ]
    return min(sizes, default=0)


def compute(
    path: Path, requests: Sequence[Request], loss: WeightedSum, device: torch.device, *, want_grad: bool
) -> Computed:
    """Computes requests that agree in element type and channels on one path."""
    if path is Path.TORCH:
        return torch_path.compute(requests, loss, device, want_grad=want_grad)
    if path is Path.TRITON:
        from lovasz.core import triton_path

        return triton_path.compute(requests, loss, device, want_grad=want_grad)
    from lovasz.core import numba_path

    sorted_below = {Path.NUMBA: SORTED_BELOW_PIXELS, Path.NUMBA_SORTED: None, Path.NUMBA_TABLES: 0}[path]
    return numba_path.compute(requests, loss, want_grad=want_grad, sorted_below=sorted_below)


_KINDS: tuple[tuple[LossLike, tuple[int, ...]], ...] = (
    ([(1.0, CrossEntropy(label_smoothing=0.1)), (1.0, LovaszSoftmax())], (1, 3, 4, 4)),
    (LovaszSoftmax(input="probabilities"), (1, 3, 4, 4)),
    (LovaszHinge(), (1, 4, 4)),
    (LovaszSoftmax(), (1, 300, 4, 4)),  # Labels that do not fit into a byte.
)


def warm_up(device: torch.device) -> None:
    """Compiles all that requests on this device will need. Takes seconds, a minute at the very first time."""
    paths = {Path.TORCH}
    if device.type == "cpu" and installed("numba"):
        paths = {Path.NUMBA_SORTED, Path.NUMBA_TABLES}
    elif device.type == "cuda" and installed("triton"):
        paths.add(Path.TRITON)
    for loss, shape in _KINDS:
        total = weighted_sum(loss)
        labels = shape if total.is_hinge else (shape[0], *shape[2:])
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            logits = torch.full(shape, 0.5, dtype=dtype, device=device)
            for want_grad in (True, False):
                request = Request.checked(logits, torch.zeros(labels, dtype=torch.uint8, device=device), total)
                for path in paths:
                    compute(path, [request], total, device, want_grad=want_grad)


def advice(device: torch.device) -> str | None:
    """What would make this device faster, for people; None if nothing is known."""
    if device.type == "cpu" and not installed("numba"):
        return "losses are computed by torch; some twenty times as fast with numba: pip install 'lovasz[cpu]'"
    if device.type == "cuda" and not installed("triton"):
        return "losses are computed by torch's own kernels; large images are faster with triton: pip install triton"
    return None
