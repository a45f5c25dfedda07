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

import numpy as np
import torch
from torch import Tensor

from lovasz.core.answers import Part, Pending
from lovasz.core.backends.torch import compute as torch_compute
from lovasz.core.batch import Batch, Request
from lovasz.core.bins import MAX_PIXELS, MOST_ORDER_ERROR, SORTED_BELOW_FOREGROUND, SORTED_BELOW_PIXELS
from lovasz.core.computed import Computed
from lovasz.core.stop import Stop
from lovasz.spec import CrossEntropy, InvalidInput, LossLike, LovaszHinge, LovaszSoftmax, WeightedSum, weighted_sum

_log = logging.getLogger(__name__)


class Backend(enum.Enum):
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
        _compute_small([Backend.TRITON], device, torch.float32)
    except Exception:
        _log.exception("Triton cannot compile for %s; losses are computed by torch's own kernels", device)
        return False
    return True


def submit(
    requests: Sequence[Request],
    loss: WeightedSum,
    device: torch.device,
    *,
    joined: Sequence[int] | None = None,
    want_grad: bool = True,
    want_total: bool = False,
    backend: Backend | None = None,
    stop: Stop | None = None,
) -> Pending:
    """Queues the computation of requests that agree in element type and channels.

    The answer to each is bit-identical to that in a batch of its own; for requests that are joined, to that for one
    request of all their images.

    Args:
        joined: how many requests, behind one another, are scored as one; None: each alone.
        want_total: for ``Pending.differentiable``.
        backend: how to compute them; None for the fastest that fits each.
        stop: asks for an early end, which the compiled loops of the CPU listen to.

    Raises:
        InvalidInput: the backend cannot be used here.
        Stopped: it was asked to end early.
    """
    whole = Batch.of(requests, joined)
    joints_of: dict[tuple[Backend, int], list[int]] = {}
    portion = numbered = 0
    for number, joint in enumerate(whole.joints):
        taken = choose(joint, loss, device) if backend is None else checked(backend, joint[0], device)
        if taken is Backend.TRITON:
            own_pixels = numbered_pixels(joint, loss)
            if numbered + own_pixels >= NUMBERED_PIXELS:
                portion, numbered = portion + 1, 0
            numbered += own_pixels
        joints_of.setdefault((taken, portion), []).append(number)
    if len(joints_of) == 1:
        (((taken, _), _),) = joints_of.items()
        computed = compute(taken, whole, loss, device, want_grad=want_grad, want_total=want_total, stop=stop)
        return Pending(whole.requests, (Part(tuple(range(len(whole.requests))), whole, loss, computed),))
    places = np.split(np.arange(len(whole.requests)), np.cumsum(whole.sizes)[:-1])
    parts = []
    for (taken, _), numbers in joints_of.items():
        own = Batch.of([request for j in numbers for request in whole.joints[j]], [whole.sizes[j] for j in numbers])
        computed = compute(taken, own, loss, device, want_grad=want_grad, want_total=want_total, stop=stop)
        parts.append(Part(tuple(int(place) for j in numbers for place in places[j]), own, loss, computed))
    return Pending(whole.requests, tuple(parts))


def choose(joint: Sequence[Request], loss: WeightedSum, device: torch.device) -> Backend:
    """The fastest backend for a joint. Depends on the joint alone, so that its answer does not depend on its batch."""
    if joint[0].logits.dtype == torch.float64:
        return Backend.TORCH
    if device.type == "cpu":
        return Backend.NUMBA if installed("numba") else Backend.TORCH
    if device.type == "cuda" and _fits_triton(joint, loss):
        return Backend.TRITON if triton_works(device) else Backend.TORCH
    return Backend.TORCH


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


def checked(backend: Backend, request: Request, device: torch.device) -> Backend:
    """Raises:
    InvalidInput: this way was asked for, and cannot be taken here.
    """
    if not isinstance(backend, Backend):
        raise InvalidInput("backend", f"got {backend!r}; expected None or one of lovasz.core.dispatch.Backend")
    if backend is Backend.TORCH:
        return backend
    if request.logits.dtype == torch.float64:
        raise InvalidInput("backend", f"got {backend} for logits of float64; expected None or Backend.TORCH")
    if backend is not Backend.TRITON and device.type != "cpu":
        raise InvalidInput(
            "backend", f"got {backend} for logits on {device}; expected None, Backend.TORCH or Backend.TRITON"
        )
    package = "triton" if backend is Backend.TRITON else "numba"
    if not installed(package):
        raise InvalidInput("backend", f"got {backend}, but {package} is not installed; expected None or Backend.TORCH")
    return backend


def compute(
    backend: Backend,
    batch: Batch,
    loss: WeightedSum,
    device: torch.device,
    *,
    want_grad: bool,
    want_total: bool = False,
    stop: Stop | None = None,
) -> Computed:
    """Computes a batch on one backend.

    Args:
        want_total: of a batch of one request with its gradient: asks for ``Computed.total``, which not all have.

    Raises:
        Stopped: it was asked to end early, and this backend listens to that.
    """
    if backend is Backend.TORCH:
        return torch_compute.compute(batch, loss, device, want_grad=want_grad)
    if backend is Backend.TRITON:
        from lovasz.core.backends.triton import compute as triton_compute

        return triton_compute.compute(batch, loss, device, want_grad=want_grad, want_total=want_total)
    from lovasz.core.backends.numba import compute as numba_compute

    counted_from = {
        Backend.NUMBA: numba_compute.Threshold(SORTED_BELOW_PIXELS, SORTED_BELOW_FOREGROUND, MOST_ORDER_ERROR),
        Backend.NUMBA_SORTED: numba_compute.Threshold(MAX_PIXELS, 0, math.inf),
        Backend.NUMBA_TABLES: numba_compute.Threshold(0, 0, math.inf),
    }[backend]
    return numba_compute.compute(batch, loss, want_grad=want_grad, counted_from=counted_from, stop=stop)


def single(logits: Tensor, labels: Tensor, loss: WeightedSum) -> tuple[Tensor, Tensor] | None:
    """The loss and the gradient of a request, if its like came before and its backend has a shorter way for it."""
    if not logits.is_cuda:
        return None
    triton_compute = sys.modules.get("lovasz.core.backends.triton.compute")
    return None if triton_compute is None else triton_compute.single(logits, labels, loss)


def give_memory_back() -> None:
    """Gives up what is kept of a device's memory for batches to come."""
    triton_compute = sys.modules.get("lovasz.core.backends.triton.compute")
    if triton_compute is not None:
        triton_compute.forget()


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
    backends = [Backend.TORCH]
    if device.type == "cpu" and installed("numba"):
        backends = [Backend.NUMBA_SORTED, Backend.NUMBA_TABLES]
    elif device.type == "cuda" and triton_works(device):
        backends.append(Backend.TRITON)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        _compute_small(backends, device, dtype)
    if Backend.TRITON in backends:  # Groups with tables.
        for loss, shape in _LARGE_KINDS:
            _compute_zeros(loss, shape, [Backend.TRITON], device, torch.float32)
    if Backend.NUMBA_TABLES in backends:  # A segment that is divided among threads.
        _compute_zeros(LovaszHinge(), (1, 4 * SORTED_BELOW_PIXELS), [Backend.NUMBA_TABLES], device, torch.float32)


def _compute_small(backends: Sequence[Backend], device: torch.device, dtype: torch.dtype) -> None:
    for loss, shape in _KINDS:
        _compute_zeros(loss, shape, backends, device, dtype)


def _compute_zeros(
    loss: LossLike, shape: tuple[int, ...], backends: Sequence[Backend], device: torch.device, dtype: torch.dtype
) -> None:
    total = weighted_sum(loss)
    labels = torch.zeros(shape if total.is_hinge else (shape[0], *shape[2:]), dtype=torch.uint8, device=device)
    labels.view(-1)[0] = 1
    request = Request.checked(torch.zeros(shape, dtype=dtype, device=device), labels, total)
    for backend, want_grad in itertools.product(backends, (True, False)):
        compute(backend, Batch.of([request]), total, device, want_grad=want_grad)


def advice(device: torch.device) -> str | None:
    """What would make this device faster, for people; None if nothing is known."""
    if device.type == "cpu" and not installed("numba"):
        return "losses are computed by torch; some twenty times as fast with numba: pip install 'lovasz[cpu]'"
    if device.type == "cuda" and not triton_works(device):
        return "losses are computed by torch's own kernels; large images are faster with triton and a C compiler"
    return None
