"""Chooses the backend for each joint of a batch, and submits batches to backends.

No other module decides which losses, element types and sizes a backend takes; Triton's limits are numbers in
``backends/triton/limits``.
"""

from __future__ import annotations

import enum
import importlib.metadata
import importlib.util
import itertools
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from lovasz.core.answers import Part, Pending
from lovasz.core.backends.torch import compute as torch_compute
from lovasz.core.backends.triton import limits
from lovasz.core.batch import Batch, Request
from lovasz.core.computed import Computed
from lovasz.core.plan import Plan
from lovasz.core.stop import Stop
from lovasz.spec import (
    BinaryCrossEntropy,
    CrossEntropy,
    InvalidInput,
    LossLike,
    LovaszHinge,
    LovaszSigmoid,
    LovaszSoftmax,
    WeightedSum,
    weighted_sum,
)

_log = logging.getLogger(__name__)

OLDEST_NUMBA = (0, 59)
"""As in pyproject.toml: the oldest on which the tests run (make compat)."""


class Backend(enum.Enum):
    """The implementations. Their results agree up to rounding and to the width of the bins (docs/mathematics.md)."""

    TORCH = "torch"
    """Runs on any device, takes any element type (the only one that takes float64), and sorts."""
    NUMBA = "numba"
    """Compiled for the CPU; sorts small groups and rare classes, and counts the others in tables."""
    TRITON = "triton"
    """Compiled for a GPU (interpreted on a CPU); sorts small groups and rare classes, counts the others in tables."""


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
    """Queues the computation of requests that have the same element type and number of channels.

    The answer to a joint does not depend on the batch: it is bit-identical to the answer to one request that holds all
    images of the joint, computed alone. Requests of a joint may have no images (N = 0): they change nothing, and get
    its answer.

    Args:
        joined: the number of consecutive requests in each joint; None if each request is scored alone.
        want_total: whether ``Pending.differentiable`` will be called.
        backend: the backend to use; None for the fastest one that takes each joint.
        stop: asks for an early end; only compiled loops on the CPU react to it.

    Raises:
        InvalidInput: the backend cannot be used here.
        RuntimeError: the current stream captures a CUDA graph.
        Stopped: the computation was asked to end early.
    """
    if device.type == "cuda":
        _refuse_capture()
    whole = Batch.of(requests, joined)
    plan_of_whole = Plan.of(whole, loss, device)
    all_places = plan_of_whole.places
    filled = whole if len(all_places) == len(requests) else whole.with_images()
    all_divided = filled.divided(loss)
    portions = _divide(all_divided, loss, device, backend)
    parts = []
    for chosen, numbers in portions:
        own, divided, places = filled, all_divided, all_places
        if len(portions) > 1:
            own = Batch.of(
                [request for j in numbers for request in filled.joints[j]], [filled.sizes[j] for j in numbers]
            )
            divided = own.divided(loss)
            stops = list(itertools.accumulate(filled.sizes))
            places = tuple([place for j in numbers for place in all_places[stops[j] - filled.sizes[j] : stops[j]]])
        plan = plan_of_whole if divided is whole else Plan.of(divided, loss, device)
        want_total = want_total and divided is own
        computed = compute(chosen, plan, divided, want_grad=want_grad, want_total=want_total, stop=stop)
        if divided is not own and computed.grads is not None:
            computed = replace(computed, grads=own.join(computed.grads))
        parts.append(Part(places, plan, own, computed))
    return Pending(whole, tuple(parts), loss, want_grad)


def _refuse_capture() -> None:
    """Raises RuntimeError during a capture, which any backend's wait for the GPU would end with an error of CUDA's."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a loss cannot be captured in a CUDA graph: it waits for the GPU, to check the labels")


def _divide(
    whole: Batch, loss: WeightedSum, device: torch.device, backend: Backend | None
) -> list[tuple[Backend, Sequence[int]]]:
    """Divides the joints among backends, and those of Triton into portions within its limits.

    Returns:
        For each portion its backend, and the positions of its joints in ``whole.joints``.
    """
    if backend is None and whole.requests:
        # A backend with limits that takes all joints as if they were one takes each of them.
        chosen = choose(whole.requests, loss, device)
        fits = chosen is Backend.TRITON and limits.tables_fit(whole.joints, loss)
        if chosen is Backend.NUMBA or (fits and triton_works(device)):
            return [(chosen, range(len(whole.sizes)))]
    joints_of: dict[tuple[Backend, int], list[int]] = {}
    portion = numbered = excess = 0
    for number, joint in enumerate(whole.joints):
        chosen = choose(joint, loss, device) if backend is None else checked(backend, joint, loss, device)
        if chosen is Backend.TRITON and backend is None and not triton_works(device):
            chosen = Backend.TORCH
        if chosen is Backend.TRITON:
            pixels, nbytes = limits.numbered_pixels(joint, loss), limits.excess_bytes(joint, loss)
            if numbered + pixels >= limits.NUMBERED_PIXELS or excess + nbytes > limits.EXCESS_BYTES:
                portion, numbered, excess = portion + 1, 0, 0
            numbered, excess = numbered + pixels, excess + nbytes
        joints_of.setdefault((chosen, portion if chosen is Backend.TRITON else 0), []).append(number)
    return [(chosen, numbers) for (chosen, _), numbers in joints_of.items()]


def choose(joint: Sequence[Request], loss: WeightedSum, device: torch.device) -> Backend:
    """The fastest backend for a joint. Depends on the joint alone, so that the batch does not change its answer."""
    if joint[0].logits.dtype == torch.float64:
        return Backend.TORCH
    if device.type == "cpu" and installed("numba"):
        return Backend.NUMBA
    if device.type == "cuda" and installed("triton") and limits.fits(joint, loss):
        return Backend.TRITON
    return Backend.TORCH


def checked(backend: Backend, joint: Sequence[Request], loss: WeightedSum, device: torch.device) -> Backend:
    """Returns the backend that the caller asked for, after checking that it can be used here.

    Raises:
        InvalidInput: it cannot be used.
    """
    if not isinstance(backend, Backend):
        raise InvalidInput("backend", f"got {backend!r}; expected None or one of lovasz.core.dispatch.Backend")
    if backend is Backend.TORCH:
        return backend
    if joint[0].logits.dtype == torch.float64:
        raise InvalidInput("backend", f"got {backend} for logits of float64; expected None or Backend.TORCH")
    if backend is not Backend.TRITON and device.type != "cpu":
        expected = "None, Backend.TORCH or Backend.TRITON"
        raise InvalidInput("backend", f"got {backend} for logits on {device}; expected {expected}")
    if backend is Backend.TRITON and not limits.fits(joint, loss):
        raise InvalidInput(
            "backend", f"got {backend}, which takes no loss of this size; expected None or Backend.TORCH"
        )
    package = "triton" if backend is Backend.TRITON else "numba"
    if not installed(package):
        raise InvalidInput(
            "backend", f"got {backend}, but no usable {package} is installed; expected None or Backend.TORCH"
        )
    if backend is Backend.TRITON and device.type != "cuda" and not (device.type == "cpu" and _triton().IS_INTERPRETED):
        raise InvalidInput("backend", f"got {backend} for logits on {device}; expected None or Backend.TORCH")
    return backend


@cache
def installed(package: str) -> bool:
    """Whether a package is installed that can be used. Imports Numba; what is wrong with it is logged once."""
    if importlib.util.find_spec(package) is None:
        return False
    if package != "numba":
        return True
    version = importlib.metadata.version(package)
    is_new_enough = tuple(map(int, re.findall(r"\d+", version)[:2])) >= OLDEST_NUMBA
    if not is_new_enough:
        expected = ".".join(map(str, OLDEST_NUMBA))
        _log.warning("numba: got version %s; expected %s or newer: pip install 'lovasz[cpu]'", version, expected)
        return False
    try:
        importlib.import_module(package)
    except ImportError as error:  # It refuses a NumPy that is newer than itself.
        hint = "numba: version %s cannot be imported: %s (NumPy here: %s); pip install --upgrade numba"
        _log.warning(hint, version, error, np.__version__)
        return False
    return True


@cache
def triton_works(device: torch.device) -> bool:
    """Whether Triton can compile: it needs a C compiler, which a container may lack. Tried once per device.

    A full device and a capture say nothing about Triton: they raise an error, and are not kept as the answer.

    Raises:
        RuntimeError: a CUDA graph is being captured, or the device is full (torch.OutOfMemoryError).
    """
    _refuse_capture()
    try:
        _compute_small([Backend.TRITON], device, torch.float32)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if "captur" in str(error):  # Another thread captures: until it ends, CUDA refuses what loads a kernel.
            raise
        _log.exception("Triton cannot compile for %s; losses are computed by torch's own kernels", device)
        return False
    return True


def compute(
    backend: Backend,
    plan: Plan,
    batch: Batch,
    *,
    want_grad: bool,
    want_total: bool = False,
    stop: Stop | None = None,
) -> Computed:
    """Computes a batch on one backend; each backend's ``compute`` takes the same arguments, without ``backend``.

    Args:
        want_total: asks for ``Computed.total``; only for a batch of one request, with its gradient.

    Raises:
        Stopped: the computation was asked to end early, and the backend reacts to it.
    """
    module = torch_compute
    if backend is not Backend.TORCH:
        module = _numba() if backend is Backend.NUMBA else _triton()
    computed: Computed = module.compute(plan, batch, want_grad=want_grad, want_total=want_total, stop=stop)
    return computed


@cache
def _numba() -> ModuleType:
    """The Numba backend; imported where it is first used, as that takes a second."""
    from lovasz.core.backends.numba import compute as module

    return module


@cache
def _triton() -> ModuleType:
    """The Triton backend, likewise."""
    from lovasz.core.backends.triton import compute as module

    return module


def replay(logits: Tensor, labels: Tensor, loss: WeightedSum) -> tuple[Tensor, Tensor] | None:
    """Replays the recording of earlier requests like this one, for its loss and gradient.

    Returns:
        (loss, gradient); None if there is no such recording, or if the request has a fault.
    """
    if not logits.is_cuda:
        return None
    triton_compute = _loaded_triton()
    return None if triton_compute is None else triton_compute.replay(logits, labels, loss)


def give_memory_back() -> None:
    """Frees the device memory that is kept for later batches."""
    triton_compute = _loaded_triton()
    if triton_compute is not None:
        triton_compute.forget()


def _loaded_triton() -> ModuleType | None:
    """The Triton backend's ``compute`` module if it has been imported, which takes a second; otherwise None."""
    module = sys.modules.get("lovasz.core.backends.triton.compute")
    return module if hasattr(module, "replay") else None  # Another thread may still be importing it.


_KINDS: tuple[tuple[LossLike, tuple[int, ...]], ...] = (
    ([(1.0, CrossEntropy(label_smoothing=0.1)), (1.0, LovaszSoftmax())], (1, 3, 4, 4)),
    (LovaszSoftmax(input="probabilities"), (1, 3, 4, 4)),
    (LovaszHinge(), (1, 4, 4)),
    ([(1.0, BinaryCrossEntropy()), (1.0, LovaszSigmoid())], (1, 4, 4)),
    (LovaszSoftmax(), (1, 300, 4, 4)),  # Labels that do not fit in a byte.
)

_LARGE_KINDS: tuple[tuple[LossLike, tuple[int, ...]], ...] = (
    (LovaszSoftmax(), (1, 19, 512, 513)),
    ([(1.0, CrossEntropy()), (1.0, LovaszSoftmax())], (1, 19, 512, 513)),
    (LovaszHinge(), (1, 512, 513)),
    ([(1.0, BinaryCrossEntropy()), (1.0, LovaszSigmoid())], (1, 512, 513)),
)
"""Losses and shapes whose groups a GPU counts in tables."""

_CPU_KINDS: tuple[tuple[LossLike, tuple[int, ...], float], ...] = (
    ([(1.0, CrossEntropy()), (1.0, LovaszSoftmax())], (1, 3, 128, 128), 0.0),
    (LovaszSoftmax(input="probabilities"), (1, 300, 16, 16), 0.0),
    (LovaszHinge(), (1, 192, 192), 0.0),
    (LovaszHinge(), (1, 192, 192), -1.0),
)
"""Losses, shapes and logits for which a CPU has further loops, most of them for segments that threads divide."""


def warm_up(device: torch.device) -> Backend:
    """Compiles what most requests on this device need. Takes seconds, and a minute or two the first time.

    Returns:
        The backend that computes most of them.
    """
    compiled = Backend.TORCH
    if device.type == "cpu" and installed("numba"):
        compiled = Backend.NUMBA
    elif device.type == "cuda" and installed("triton") and triton_works(device):
        compiled = Backend.TRITON
    backends = [Backend.NUMBA] if compiled is Backend.NUMBA else list(dict.fromkeys([Backend.TORCH, compiled]))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        _compute_small(backends, device, dtype)
    if compiled is Backend.TRITON:
        # Large groups with other element types or class counts are compiled when they first occur, in seconds.
        for loss, shape in _LARGE_KINDS:
            _compute_equal(loss, shape, [compiled], device, torch.float32)
    elif compiled is Backend.NUMBA:
        as_large = _numba().extension.AS_LARGE
        for loss, shape, logit in _CPU_KINDS:
            plan, batch = _equal(loss, shape, device, torch.float32, logit)
            for want_grad in (True, False):
                _numba().compute(plan, batch, want_grad=want_grad, thresholds=as_large)
    return compiled


def _compute_small(backends: Sequence[Backend], device: torch.device, dtype: torch.dtype) -> None:
    for loss, shape in _KINDS:
        _compute_equal(loss, shape, backends, device, dtype)


def _compute_equal(
    loss: LossLike, shape: tuple[int, ...], backends: Sequence[Backend], device: torch.device, dtype: torch.dtype
) -> None:
    plan, batch = _equal(loss, shape, device, dtype)
    for backend, want_grad in itertools.product(backends, (True, False)):
        compute(backend, plan, batch, want_grad=want_grad)


def _equal(
    loss: LossLike, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, logit: float = 0.0
) -> tuple[Plan, Batch]:
    """A request with equal logits. At -1 few errors of the hinge are above 0: a CPU has other loops for that."""
    total = weighted_sum(loss)
    labels = torch.zeros(shape if total.is_binary else (shape[0], *shape[2:]), dtype=torch.uint8, device=device)
    labels.view(-1)[: max(1, labels.numel() // 8)] = 1
    batch = Batch.of([Request.checked(torch.full(shape, logit, dtype=dtype, device=device), labels, total)])
    return Plan.of(batch, total, device), batch


def advice(device: torch.device) -> str | None:
    """A message to the operator that says what would make this device faster; None if nothing would."""
    if device.type == "cpu" and not installed("numba"):
        return "losses are computed by torch; about twenty times as fast with numba: pip install 'lovasz[cpu]'"
    if device.type == "cuda" and not (installed("triton") and triton_works(device)):
        return "losses are computed by torch's own kernels; large images are faster with triton and a C compiler"
    return None
