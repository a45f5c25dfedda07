"""The Triton backend's entry point: a handful of launches for any batch, and no step waits for the device.

Up to four sweeps compute statistics of each pixel, count errors in tables, list the pixels to be sorted, and write the
gradients. Sorted are all pixels of small groups and, in larger groups, pixels that weigh much (docs/mathematics.md,
section 11). Logits that are on the device are read in place.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor

from lovasz.core.backends.triton import tables
from lovasz.core.backends.triton.columns import Address, BinaryCounter, Cross, Group, Outcome, Segment, SoftmaxCounter
from lovasz.core.backends.triton.graphs import GRAPHS
from lovasz.core.backends.triton.layout import Kind
from lovasz.core.backends.triton.program import Program, host_bytes
from lovasz.core.batch import Batch
from lovasz.core.computed import Computed, Fault, TermValues, Values
from lovasz.core.plan import Plan
from lovasz.core.scoring import State
from lovasz.core.stop import Stop
from lovasz.spec import BinaryCrossEntropy, CrossEntropy, LovaszLoss, WeightedSum

KEPT_PROGRAMS = 64
"""The most programs that are kept, those used last; most take some hundred kilobytes of device memory each."""
KEPT_BYTES = 1 << 26
"""The most device memory that they take; a program that needs more is not kept. On the host they take about twice as
much. A batch of 150,000 points, each an image of its own for a term with ``per_image``, needs 32 MiB."""

IS_INTERPRETED = not isinstance(tables.scan, triton.JITFunction)
"""Whether the kernels run on a CPU, under Triton's interpreter: ``TRITON_INTERPRET=1`` was set when it was imported."""

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
        addresses = addresses_of(program, tensors, grads, total)
        if device.type != "cuda":
            return _interpreted(program, addresses, grads, total)
        stream = torch.cuda.current_stream(device)
        recording = GRAPHS.take(program, stream)
        try:
            if recording is None:
                workspace = program.begin(addresses.to(device, non_blocking=True), stream)
            else:
                workspace = recording.begin(addresses, stream)
            faults = _to_host(workspace.faults, stream) if total is not None else None
            if recording is None:
                program.finish(workspace)
            else:
                recording.finish()
            if total is None:
                results = _to_host(workspace.results, stream)
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
    if logits.device.index != torch.cuda.current_device() or torch.cuda.is_current_stream_capturing():
        return None
    stream = torch.cuda.current_stream()
    recording = GRAPHS.take(program, stream)
    if recording is None:
        return None
    try:
        grad = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        total = torch.empty((), dtype=torch.float32, device=logits.device)
        is_good = recording.replay(logits.data_ptr(), labels.data_ptr(), grad.data_ptr(), total.data_ptr(), stream)
    finally:
        GRAPHS.put_back(program, recording)
    return (total, grad) if is_good else None


def _interpreted(program: Program, addresses: Tensor, grads: Grads, total: Tensor | None) -> Computed:
    workspace = program.begin(addresses, None)
    program.finish(workspace)
    results, is_faulty = workspace.results.numpy(), bool(workspace.faults.any())
    return Computed(
        grads,
        values=lambda: read(program, results),
        total=None if total is None else lambda: None if is_faulty else total,
    )


def _copied_when_asked(values: Tensor) -> Callable[[], npt.NDArray[np.uint8]]:
    return lambda: values.cpu().numpy()


def _to_host(values: Tensor, stream: torch.cuda.Stream) -> Callable[[], npt.NDArray[np.uint8]]:
    """Queues a copy to the host on the current stream; returns a function that waits for it."""
    on_host = host_bytes(len(values), values.device)
    on_host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(stream)

    def wait() -> npt.NDArray[np.uint8]:
        copied.synchronize()
        return on_host.numpy()

    return wait


def prepare(plan: Plan, batch: Batch, *, want_grad: bool) -> tuple[Program, Tensors, Grads]:
    """The program of a batch, its tensors on the device, and memory for its gradients, if they are wanted."""
    device = plan.device
    logits = _on_device([request.logits for request in batch.requests], device)
    labels = _on_device([request.labels for request in batch.requests], device)
    label_types = {own.dtype for own in labels}
    if torch.bool in label_types or len(label_types) > 1:
        labels = [_as_integers(own, label_types) for own in labels]
    grads = _memory_for_grads(logits, device) if want_grad else None
    program = program_of(Kind(plan, logits[0].dtype, labels[0].dtype, want_grad))
    return program, list(zip(logits, labels, strict=True)), grads


def _memory_for_grads(logits: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    """Memory for the gradients. Requests of one shape share a piece: each piece takes the host some microseconds."""
    grads: list[Tensor] = []
    for shape, own in itertools.groupby([tensor.shape for tensor in logits]):
        count = len(list(own))
        if count == 1:
            grads.append(torch.empty(shape, dtype=torch.float32, device=device))
        else:
            grads += torch.empty((count, *shape), dtype=torch.float32, device=device).unbind()
    return tuple(grads)


def program_of(kind: Kind) -> Program:
    """The program of a kind of batch; made if it is not kept."""
    with _programs_lock:
        program = _programs.get(kind)
        if program is not None:
            _programs.move_to_end(kind)
            return program
    program = Program(kind)
    if program.static_bytes > KEPT_BYTES:
        return program
    with _programs_lock:
        _programs[kind] = program
        while len(_programs) > KEPT_PROGRAMS or sum(own.static_bytes for own in _programs.values()) > KEPT_BYTES:
            _programs.popitem(last=False)
    return program


def forget() -> None:
    """Frees all programs and recordings, and their memory."""
    GRAPHS.clear()
    _replays.clear()
    with _programs_lock:
        _programs.clear()


def _on_device(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on the device, contiguous; only those are copied that are not so yet."""
    return [
        tensor
        if tensor.device == device and tensor.is_contiguous()
        else tensor.detach().to(device, non_blocking=True).contiguous()
        for tensor in tensors
    ]


def _as_integers(labels: Tensor, types: set[torch.dtype]) -> Tensor:
    """Labels as integers, of the same type for all requests of a batch, whose labels have these types."""
    if types <= {torch.bool, torch.uint8}:
        return labels.view(torch.uint8)
    return labels.to(torch.int64)


def addresses_of(program: Program, tensors: Tensors, grads: Grads, total: Tensor | None = None) -> Tensor:
    """The addresses for a batch, as ``Program.begin`` takes them, but on the host; for a GPU in pinned memory."""
    firsts = np.zeros((len(tensors), len(Address)), np.int64)
    firsts[:, Address.LOGITS] = [logits.data_ptr() for logits, _ in tensors]
    firsts[:, Address.LABELS] = [labels.data_ptr() for _, labels in tensors]
    if grads is not None:
        firsts[:, Address.GRAD] = [grad.data_ptr() for grad in grads]
    origin = program.layout.origin
    on_host = host_bytes(program.address_bytes, program.device)
    addresses = on_host.numpy().view(np.int64)
    np.add(firsts[origin.request], origin.offsets, out=addresses[:-1].reshape(origin.offsets.shape))
    addresses[-1] = 0 if total is None else total.data_ptr()
    return on_host


def read(program: Program, results: npt.NDArray[np.uint8]) -> Values:
    """Reads the values of a batch from the bytes of its results."""
    plan, layout = program.kind.plan, program.layout
    channels, joints, is_binary = layout.channels, layout.joints, plan.is_binary
    segments = program.result("segments", results, len(layout.groups), channels, len(Segment))
    sums = program.result("cross_sums", results, len(layout.entropies), joints, len(Cross))
    losses = np.ldexp(segments[..., Segment.LOSS].astype(np.float64), segments[..., Segment.UNIT])
    states = segments[..., Segment.STATE]
    # NumPy takes long to compare with a member of an enumeration.
    scored = states != State.PASSED_OVER.value
    if layout.any_table:
        largest = (segments[..., Segment.LARGEST] >> 32).astype(np.int32).view(np.float32)
        has_table = layout.groups[:, Group.BINS] > 0
        losses = np.where((states == State.ABSENT.value) & has_table[:, None], largest, losses)
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
