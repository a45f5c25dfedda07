"""The ways in which a batch can be computed, and which one a request takes."""

from __future__ import annotations

import enum
import importlib.util
import itertools
import logging
import math
import sys
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from lovasz.core import torch_path
from lovasz.core.bins import MAX_PIXELS, MOST_ORDER_ERROR, SORTED_BELOW_FOREGROUND, SORTED_BELOW_PIXELS
from lovasz.core.computed import Computed
from lovasz.core.ragged import Batch, Request
from lovasz.core.stop import Stop
from lovasz.spec import CrossEntropy, InvalidInput, LossLike, LovaszHinge, LovaszSoftmax, WeightedSum, weighted_sum

_log = logging.getLogger(__name__)


class Path(enum.Enum):
    """All give the same answers, up to rounding and to the width of the tables' bins (docs/mathematics.md)."""

    TORCH = "torch"
    """Sorts; any device and dtype. The only one for float64."""
    NUMBA = "numba"
    """Compiled, on the CPU: sorts small groups and rare classes, counts the others in tables."""
    NUMBA_SORTED = "numba, sorted"
    """The same, all groups sorted."""
    NUMBA_TABLES = "numba, tables"
    """The same, all groups counted."""
    TRITON = "triton"
    """Compiled, on a GPU (and on a CPU under Triton's interpreter): sorts small groups and rare classes, counts the
    others in tables."""


@cache
def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@cache
def triton_works(device: torch.device) -> bool:
    """Whether Triton is there and can compile: it needs a C compiler, which a container may lack. Tried once."""
    if not installed("triton"):
        return False
    try:
        _compute_small([Path.TRITON], device, torch.float32)
    except Exception:
        _log.exception("Triton cannot compile for %s; losses are computed by torch's own kernels", device)
        return False
    return True


def choose(joint: Sequence[Request], loss: WeightedSum, device: torch.device) -> Path:
    """The fastest path for a joint. Depends on the joint alone, so that its answer does not depend on its batch."""
    if joint[0].logits.dtype == torch.float64:
        return Path.TORCH
    if device.type == "cpu":
        return Path.NUMBA if installed("numba") else Path.TORCH
    if device.type == "cuda" and _fits_triton(joint, loss):
        return Path.TRITON if triton_works(device) else Path.TORCH
    return Path.TORCH


TRITON_CLASSES = 512
"""A class takes a table of 1.3 MB in large groups."""
TRITON_SEGMENTS = 1 << 20


def _fits_triton(joint: Sequence[Request], loss: WeightedSum) -> bool:
    """Whether it has not too many classes, groups or pixels in a group for tables."""
    images = sum(request.layout.images for request in joint)
    pixels = sum(request.layout.images * request.layout.pixels for request in joint)
    channels = joint[0].layout.channels
    of_terms = {term.per_image for _, term in loss.terms if not isinstance(term, CrossEntropy)}
    segments = channels * sum(images if per_image else 1 for per_image in of_terms)
    fits = segments <= TRITON_SEGMENTS and pixels < MAX_PIXELS and numbered_pixels(joint, loss) < NUMBERED_PIXELS
    return fits and (loss.is_hinge or channels <= TRITON_CLASSES)


NUMBERED_PIXELS = 1 << 31
"""The GPU's kernels number the pixels of a batch with so many integers, ..."""


def numbered_pixels(requests: Sequence[Request], loss: WeightedSum) -> int:
    """... those of each binary label apart."""
    layouts = [request.layout for request in requests]
    return sum(layout.images * layout.pixels * (layout.channels if loss.is_hinge else 1) for layout in layouts)


def checked(path: Path, request: Request, device: torch.device) -> Path:
    """Raises:
    InvalidInput: this way was asked for, and cannot be taken here.
    """
    if not isinstance(path, Path):
        raise InvalidInput("path", f"got {path!r}; expected None or one of lovasz.core.paths.Path")
    if path is Path.TORCH:
        return path
    if request.logits.dtype == torch.float64:
        raise InvalidInput("path", f"got {path} for logits of float64; expected None or Path.TORCH")
    if path is not Path.TRITON and device.type != "cpu":
        raise InvalidInput("path", f"got {path} for logits on {device}; expected None, Path.TORCH or Path.TRITON")
    package = "triton" if path is Path.TRITON else "numba"
    if not installed(package):
        raise InvalidInput("path", f"got {path}, but {package} is not installed; expected None or Path.TORCH")
    return path


def compute(
    path: Path,
    batch: Batch,
    loss: WeightedSum,
    device: torch.device,
    *,
    want_grad: bool,
    want_total: bool = False,
    stop: Stop | None = None,
) -> Computed:
    """Computes a batch on one path.

    Args:
        want_total: of a batch of one request with its gradient: asks for ``Computed.total``, which not all paths have.

    Raises:
        Stopped: it was asked to end early, and this path listens to that.
    """
    if path is Path.TORCH:
        return torch_path.compute(batch, loss, device, want_grad=want_grad)
    if path is Path.TRITON:
        from lovasz.core import triton_path

        return triton_path.compute(batch, loss, device, want_grad=want_grad, want_total=want_total)
    from lovasz.core import numba_path

    counted_from = {
        Path.NUMBA: numba_path.Threshold(SORTED_BELOW_PIXELS, SORTED_BELOW_FOREGROUND, MOST_ORDER_ERROR),
        Path.NUMBA_SORTED: numba_path.Threshold(MAX_PIXELS, 0, math.inf),
        Path.NUMBA_TABLES: numba_path.Threshold(0, 0, math.inf),
    }[path]
    return numba_path.compute(batch, loss, want_grad=want_grad, counted_from=counted_from, stop=stop)


def single(logits: Tensor, labels: Tensor, loss: WeightedSum) -> tuple[Tensor, Tensor] | None:
    """The loss and the gradient of a request, if its like came before and its path has a shorter way for it."""
    if not logits.is_cuda:
        return None
    triton_path = sys.modules.get("lovasz.core.triton_path")
    return None if triton_path is None else triton_path.single(logits, labels, loss)


def give_memory_back() -> None:
    """Gives up what is kept of a device's memory for batches to come."""
    triton_path = sys.modules.get("lovasz.core.triton_path")
    if triton_path is not None:
        triton_path.forget()


_KINDS: tuple[tuple[LossLike, tuple[int, ...]], ...] = (
    ([(1.0, CrossEntropy(label_smoothing=0.1)), (1.0, LovaszSoftmax())], (1, 3, 4, 4)),
    (LovaszSoftmax(input="probabilities"), (1, 3, 4, 4)),
    (LovaszHinge(), (1, 4, 4)),
    (LovaszSoftmax(), (1, 300, 4, 4)),  # Labels that do not fit into a byte.
)


_LARGE_KINDS: tuple[tuple[LossLike, tuple[int, ...]], ...] = (
    (LovaszSoftmax(), (1, 19, 512, 513)),
    ([(1.0, CrossEntropy()), (1.0, LovaszSoftmax())], (1, 19, 512, 513)),
    (LovaszHinge(), (1, 512, 513)),
)


def warm_up(device: torch.device) -> None:
    """Compiles all that requests on this device will need. Takes seconds, and up to a minute the first time."""
    paths = [Path.TORCH]
    if device.type == "cpu" and installed("numba"):
        paths = [Path.NUMBA_SORTED, Path.NUMBA_TABLES]
    elif device.type == "cuda" and triton_works(device):
        paths.append(Path.TRITON)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        _compute_small(paths, device, dtype)
    if Path.TRITON in paths:  # Groups that have tables; for other types and numbers of classes it takes seconds once.
        for loss, shape in _LARGE_KINDS:
            _compute_zeros(loss, shape, [Path.TRITON], device, torch.float32)
    if Path.NUMBA_TABLES in paths:  # A segment that is divided among threads.
        _compute_zeros(LovaszHinge(), (1, 4 * SORTED_BELOW_PIXELS), [Path.NUMBA_TABLES], device, torch.float32)


def _compute_small(paths: Sequence[Path], device: torch.device, dtype: torch.dtype) -> None:
    for loss, shape in _KINDS:
        _compute_zeros(loss, shape, paths, device, dtype)


def _compute_zeros(
    loss: LossLike, shape: tuple[int, ...], paths: Sequence[Path], device: torch.device, dtype: torch.dtype
) -> None:
    total = weighted_sum(loss)
    labels = torch.zeros(shape if total.is_hinge else (shape[0], *shape[2:]), dtype=torch.uint8, device=device)
    labels.view(-1)[0] = 1
    request = Request.checked(torch.zeros(shape, dtype=dtype, device=device), labels, total)
    for path, want_grad in itertools.product(paths, (True, False)):
        compute(path, Batch.of([request]), total, device, want_grad=want_grad)


def advice(device: torch.device) -> str | None:
    """What would make this device faster, for people; None if nothing is known."""
    if device.type == "cpu" and not installed("numba"):
        return "losses are computed by torch; some twenty times as fast with numba: pip install 'lovasz[cpu]'"
    if device.type == "cuda" and not triton_works(device):
        return "losses are computed by torch's own kernels; large images are faster with triton and a C compiler"
    return None
