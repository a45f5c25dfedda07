"""The Triton backend's entry point: a handful of launches for any batch, and no step waits for the device.

Up to four sweeps compute statistics of each pixel, count errors in tables, list the pixels to be sorted, and write the
gradients. Sorted are all pixels of small groups and, in larger groups, pixels that weigh much (docs/mathematics.md,
section 11). Logits that are on the device are read in place.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lovasz.core.backends.triton.columns import Address, BinaryCounter, Cross, Group, Outcome, Segment, SoftmaxCounter
from lovasz.core.backends.triton.graphs import GRAPHS
from lovasz.core.backends.triton.layout import Kind
from lovasz.core.backends.triton.program import Program, to_device
from lovasz.core.batch import Batch, Request
from lovasz.core.computed import Computed, Fault, TermValues, Values
from lovasz.core.plan import Plan
from lovasz.core.scoring import State
from lovasz.core.stop import Stop
from lovasz.spec import BinaryCrossEntropy, CrossEntropy, LovaszLoss, WeightedSum

KEPT_PROGRAMS = 64
"""The most programs that are kept, those used last; each takes some hundred kilobytes of device memory."""

Tensors = Sequence[tuple[Tensor, Tensor]]
"""Logits and labels of each request, on the device."""
Grads = tuple[Tensor, ...] | None

_programs: OrderedDict[Kind, Program] = OrderedDict()
_programs_lock = threading.Lock()
_replays: dict[tuple[object, ...], Program] = {}
"""The programs with recordings for single requests on the device, by ``_key``."""


def compute(
    plan: Plan, batch: Batch, *, want_grad: bool, want_total: bool = False, stop: Stop | None = None
) -> Computed:
    """Queues the computation of a batch of any element type except float64; ignores ``stop``.

    Queues a copy of the results to the host, too; with ``want_total``, ``Computed.values`` copies them instead.
    """
    device = plan.device
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with torch.no_grad(), current:  # Triton launches on the current device.
        program, tensors, grads = prepare(plan, batch, want_grad=want_grad)
        total = torch.empty((), dtype=torch.float32, device=device) if want_total else None
        addresses = torch.from_numpy(addresses_of(program, tensors, grads, total)).view(torch.uint8)
        if device.type != "cuda":
            return _interpreted(program, addresses, grads, total)
        stream = torch.cuda.current_stream(device).cuda_stream
        recording = GRAPHS.take(program, stream)
        try:
            if recording is None:
                workspace = program.begin(to_device(addresses, device))
            else:
                workspace = recording.begin(addresses.pin_memory(), stream)
            faults = _to_host(workspace.faults) if total is not None else None
            if recording is None:
                program.finish(workspace)
            else:
                recording.finish()
            if total is None:
                results = _to_host(workspace.results)
            else:  # Cloned, since another thread may take the recording, and with it the workspace, next.
                results = _copied_when_asked(workspace.results.clone())
        finally:
            if recording is not None:
                GRAPHS.put_back(program, recording)
        if recording is not None and total is not None and len(program.layout.origin.request) == 1:
            (request,) = batch.requests
            if len(_replays) >= KEPT_PROGRAMS:
                _replays.clear()
            _replays[_key(request.logits, request.labels, plan.loss)] = program
        return Computed(
            grads,
            values=lambda: read(program, results()),
            total=None if faults is None else lambda: None if faults().any() else total,
        )


def _key(logits: Tensor, labels: Tensor, loss: WeightedSum) -> tuple[object, ...]:
    """What two requests must have in common for one recording to serve both."""
    return loss, logits.shape, labels.shape, logits.dtype, labels.dtype, logits.device, labels.device


def replay(logits: Tensor, labels: Tensor, loss: WeightedSum) -> tuple[Tensor, Tensor] | None:
    """Replays the recording of earlier requests like this one, for its loss and gradient.

    Skips the host's work on plan and batch, which takes most of the time of a call that replays a recording.

    Returns:
        (loss, gradient); None if there is no recording that can be used, or if the request has a fault.
    """
    program = _replays.get(_key(logits, labels, loss))
    if program is None or not (logits.is_contiguous() and labels.is_contiguous()) or logits.is_neg():
        return None
    if logits.device.index != torch.cuda.current_device():
        return None
    stream = torch.cuda.current_stream().cuda_stream
    recording = GRAPHS.take(program, stream)
    if recording is None:
        return None
    grad = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    total = torch.empty((), dtype=torch.float32, device=logits.device)
    try:
        is_good = recording.replay(logits.data_ptr(), labels.data_ptr(), grad.data_ptr(), total.data_ptr(), stream)
    finally:
        GRAPHS.put_back(program, recording)
    return (total, grad) if is_good else None


def _interpreted(program: Program, addresses: Tensor, grads: Grads, total: Tensor | None) -> Computed:
    workspace = program.begin(addresses)
    program.finish(workspace)
    results, is_faulty = workspace.results.numpy(), bool(workspace.faults.any())
    return Computed(
        grads,
        values=lambda: read(program, results),
        total=None if total is None else lambda: None if is_faulty else total,
    )


def _copied_when_asked(values: Tensor) -> Callable[[], npt.NDArray[np.uint8]]:
    return lambda: values.cpu().numpy()


def _to_host(values: Tensor) -> Callable[[], npt.NDArray[np.uint8]]:
    """Queues a copy to the host; returns a function that waits for it."""
    on_host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
    on_host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> npt.NDArray[np.uint8]:
        copied.synchronize()
        return on_host.numpy()

    return wait


def prepare(plan: Plan, batch: Batch, *, want_grad: bool) -> tuple[Program, Tensors, Grads]:
    """The program of a batch, its tensors on the device, and memory for its gradients, if they are wanted."""
    tensors = [_on_device(request, plan.device) for request in batch.requests]
    if len({labels.dtype for _, labels in tensors}) > 1:
        tensors = [(logits, labels.to(torch.int64)) for logits, labels in tensors]
    grads = None
    if want_grad:
        grads = tuple(torch.empty(logits.shape, dtype=torch.float32, device=plan.device) for logits, _ in tensors)
    (logits, labels), *_ = tensors
    return program_of(Kind(plan, logits.dtype, labels.dtype, want_grad)), tensors, grads


def program_of(kind: Kind) -> Program:
    """The program of a kind of batch; made if it is not kept."""
    with _programs_lock:
        program = _programs.get(kind)
        if program is not None:
            _programs.move_to_end(kind)
            return program
    program = Program(kind)
    with _programs_lock:
        _programs[kind] = program
        while len(_programs) > KEPT_PROGRAMS:
            _programs.popitem(last=False)
    return program


def forget() -> None:
    """Frees all programs and recordings, and their memory."""
    GRAPHS.clear()
    _replays.clear()
    with _programs_lock:
        _programs.clear()


def _on_device(request: Request, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits and labels on the device, contiguous; copied only if they are not yet."""
    logits = request.logits.detach().to(device, non_blocking=True).contiguous()
    labels = request.labels.to(device, non_blocking=True).contiguous()
    return logits, labels.view(torch.uint8) if labels.dtype == torch.bool else labels


def addresses_of(
    program: Program, tensors: Tensors, grads: Grads, total: Tensor | None = None
) -> npt.NDArray[np.int64]:
    """The addresses for a batch: one row of ``columns.Address`` per plane, flat, then the address of the loss, or 0."""
    (logits, labels), *_ = tensors
    origin = program.layout.origin
    firsts = np.array([(logits.data_ptr(), labels.data_ptr(), 0) for logits, labels in tensors], np.int64)
    if grads is not None:
        firsts[:, Address.GRAD] = [grad.data_ptr() for grad in grads]
    everything = np.zeros(program.address_bytes // 8, np.int64)
    addresses = everything[:-1].reshape(-1, len(Address))
    addresses[:] = firsts[origin.request]
    addresses[:, Address.LOGITS] += origin.logits * logits.element_size()
    addresses[:, Address.LABELS] += origin.labels * labels.element_size()
    addresses[:, Address.GRAD] += origin.logits * torch.float32.itemsize
    everything[-1] = 0 if total is None else total.data_ptr()
    return everything


def read(program: Program, results: npt.NDArray[np.uint8]) -> Values:
    """Reads the values of a batch from the bytes of its results."""
    plan, layout = program.kind.plan, program.layout
    channels, joints, is_binary = layout.channels, layout.joints, plan.is_binary
    segments = program.result("segments", results, len(layout.groups), channels, len(Segment))
    sums = program.result("cross_sums", results, len(layout.entropies), joints, len(Cross))
    losses = np.ldexp(segments[..., Segment.LOSS].astype(np.float64), segments[..., Segment.UNIT])
    states = segments[..., Segment.STATE]
    largest = (segments[..., Segment.LARGEST] >> 32).astype(np.int32).view(np.float32)
    has_table = layout.groups[:, Group.BINS] > 0
    losses = np.where((states == State.ABSENT) & has_table[:, None], largest, losses)
    scored = states != State.PASSED_OVER
    terms: list[TermValues] = []
    rows = iter(zip(layout.first_rows, [*layout.first_rows[1:], len(layout.groups)], strict=True))
    entropies = iter(sums)
    for term in plan.terms:
        if isinstance(term.loss, LovaszLoss):
            own = slice(*next(rows))
            terms.append(TermValues(losses[own].T, scored[own].T))
        elif isinstance(term.loss, CrossEntropy | BinaryCrossEntropy):
            row = next(entropies)
            mean = np.ascontiguousarray(row[:, Cross.MEAN]).view(np.float64)
            values = (np.ldexp(row[:, Cross.SUM].astype(np.float64), row[:, Cross.UNIT]) * mean)[None]
            terms.append(TermValues(values, np.ones_like(values, np.bool_)))
        else:
            raise NotImplementedError(term.loss.kind)
    # The first grouping has the joints as groups, and counts pixels that are valid for any rule.
    fields = len(BinaryCounter) if is_binary else len(SoftmaxCounter)
    counters = program.result("counters", results, -1)[: joints * fields * channels].reshape(joints, fields, channels)
    outcomes = (
        program.result("predictions", results, joints, len(Outcome), channels).astype(np.int64).transpose(1, 2, 0)
    )
    return Values(
        tuple(terms),
        labels=counters[:, 0].T.astype(np.int64),
        predictions=outcomes[Outcome.PREDICTED],
        hits=outcomes[Outcome.HIT],
        faults=program.result("faults", results, joints, len(Fault)).T.astype(np.int64),
    )
