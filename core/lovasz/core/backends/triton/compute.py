"""The path of Triton: compiled for the GPU, a handful of launches for any batch, no step waits for the device.

Three sweeps over the pixels: statistics of each, counts of their errors in tables, and the way back. Logits are read
where they are, and the gradient is written once, straight to its place. Small groups are sorted instead of counted,
and so are, in larger ones, the pixels that weigh much (docs/mathematics.md, section 11).
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

from lovasz.core.backends.triton.columns import Address, Cross, Fault, Group, Segment, State
from lovasz.core.backends.triton.graphs import GRAPHS
from lovasz.core.backends.triton.plan import Plan, Signature, to_device
from lovasz.core.batch import Batch, Request
from lovasz.core.computed import Computed, TermValues, Values
from lovasz.spec import CrossEntropy, WeightedSum

KEPT_PLANS = 64
"""Plans of the latest signatures; each takes some hundred kilobytes of the device's memory."""

Tensors = Sequence[tuple[Tensor, Tensor]]
"""Logits and labels of each request, on the device."""
Grads = tuple[Tensor, ...] | None

_plans: OrderedDict[Signature, Plan] = OrderedDict()
_plans_lock = threading.Lock()
_singles: dict[tuple[object, ...], Plan] = {}
"""Plans of single requests on the device that have been recorded, by all that has to agree."""


def compute(
    batch: Batch, loss: WeightedSum, device: torch.device, *, want_grad: bool, want_total: bool = False
) -> Computed:
    """Queues the computation of a batch (not of float64).

    Args:
        want_total: of a batch of one request with its gradient: ``Computed.total`` in place of the copy to the host,
            which ``Computed.values`` makes then.
    """
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with torch.no_grad(), current:  # Triton launches on the current device.
        plan, tensors, grads = prepare(batch, loss, device, want_grad=want_grad)
        total = torch.empty((), dtype=torch.float32, device=device) if want_total else None
        addresses = torch.from_numpy(addresses_of(plan, tensors, grads, total)).view(torch.uint8)
        if device.type != "cuda":
            return _interpreted(plan, addresses, grads, total)
        stream = torch.cuda.current_stream(device).cuda_stream
        recording = GRAPHS.take(plan, stream)
        try:
            if recording is None:
                workspace = plan.begin(to_device(addresses, device))
            else:
                workspace = recording.begin(addresses.pin_memory(), stream)
            faults = _to_host(workspace.faults) if total is not None else None
            if recording is None:
                plan.finish(workspace)
            else:
                recording.finish()
            # Another thread may take the recording, and so the workspace, next: what is not copied now gets a place.
            small = _to_host(workspace.small) if total is None else _copied_when_asked(workspace.small.clone())
        finally:
            if recording is not None:
                GRAPHS.put_back(plan, recording)
        if recording is not None and total is not None and len(plan.origin.request) == 1:
            (request,) = batch.requests
            if len(_singles) >= KEPT_PLANS:
                _singles.clear()
            _singles[_key(request.logits, request.labels, loss)] = plan
        return Computed(
            grads,
            values=lambda: read(plan, small()),
            total=None if faults is None else lambda: None if faults().any() else total,
        )


def _key(logits: Tensor, labels: Tensor, loss: WeightedSum) -> tuple[object, ...]:
    """What has to agree for a request to be like another."""
    return loss, logits.shape, labels.shape, logits.dtype, labels.dtype, logits.device, labels.device


def single(logits: Tensor, labels: Tensor, loss: WeightedSum) -> tuple[Tensor, Tensor] | None:
    """The loss and the gradient of a request whose like came before; None if none did, or if it has a fault.

    Takes none of the steps that a batch needs: they are most of the time of a call that a graph computes.
    """
    plan = _singles.get(_key(logits, labels, loss))
    if plan is None or not (logits.is_contiguous() and labels.is_contiguous()):
        return None
    if logits.device.index != torch.cuda.current_device():
        return None
    stream = torch.cuda.current_stream().cuda_stream
    recording = GRAPHS.take(plan, stream)
    if recording is None:
        return None
    grad = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    total = torch.empty((), dtype=torch.float32, device=logits.device)
    try:
        is_good = recording.single(logits.data_ptr(), labels.data_ptr(), grad.data_ptr(), total.data_ptr(), stream)
    finally:
        GRAPHS.put_back(plan, recording)
    return (total, grad) if is_good else None


def _interpreted(plan: Plan, addresses: Tensor, grads: Grads, total: Tensor | None) -> Computed:
    workspace = plan.begin(addresses)
    plan.finish(workspace)
    small = workspace.small.numpy()
    is_faulty = bool(workspace.faults.any())
    if total is None:
        return Computed(grads, values=lambda: read(plan, small))
    return Computed(grads, values=lambda: read(plan, small), total=lambda: None if is_faulty else total)


def _copied_when_asked(values: Tensor) -> Callable[[], npt.NDArray[np.uint8]]:
    return lambda: values.cpu().numpy()


def _to_host(values: Tensor) -> Callable[[], npt.NDArray[np.uint8]]:
    """Queues a copy; what it returns waits for it."""
    on_host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    on_host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> npt.NDArray[np.uint8]:
        copied.synchronize()
        return on_host.numpy()

    return wait


def prepare(batch: Batch, loss: WeightedSum, device: torch.device, *, want_grad: bool) -> tuple[Plan, Tensors, Grads]:
    """The plan of a batch, its tensors on the device, and room for its gradients."""
    tensors = [_on_device(request, device) for request in batch.requests]
    if len({labels.dtype for _, labels in tensors}) > 1:
        tensors = [(logits, labels.to(torch.int64)) for logits, labels in tensors]
    grads = None
    if want_grad:
        grads = tuple(torch.empty(logits.shape, dtype=torch.float32, device=device) for logits, _ in tensors)
    (logits, labels), *_ = tensors
    layouts = tuple(request.layout for request in batch.requests)
    plan = plan_of(Signature(loss, layouts, batch.sizes, logits.dtype, labels.dtype, want_grad, logits.device))
    return plan, tensors, grads


def plan_of(signature: Signature) -> Plan:
    """The plan of all batches of a signature; made if it is not known."""
    with _plans_lock:
        plan = _plans.get(signature)
        if plan is not None:
            _plans.move_to_end(signature)
            return plan
    plan = Plan(signature)
    with _plans_lock:
        _plans[signature] = plan
        while len(_plans) > KEPT_PLANS:
            _plans.popitem(last=False)
    return plan


def forget() -> None:
    """Gives up all plans and graphs, and their memory."""
    GRAPHS.clear()
    _singles.clear()
    with _plans_lock:
        _plans.clear()


def _on_device(request: Request, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits and labels on the device; what is there already and contiguous stays where it is."""
    logits = request.logits.detach().to(device, non_blocking=True).contiguous()
    labels = request.labels.to(device, non_blocking=True).contiguous()
    return logits, labels.view(torch.uint8) if labels.dtype == torch.bool else labels


def addresses_of(plan: Plan, tensors: Tensors, grads: Grads, total: Tensor | None = None) -> npt.NDArray[np.int64]:
    """Of each plane: :class:`Address`, one after the other; at the end that of the loss, or 0."""
    (logits, labels), *_ = tensors
    firsts = np.array([(logits.data_ptr(), labels.data_ptr(), 0) for logits, labels in tensors], np.int64)
    if grads is not None:
        firsts[:, Address.GRAD] = [grad.data_ptr() for grad in grads]
    origin = plan.origin
    everything = np.zeros(plan.address_bytes // 8, np.int64)
    addresses = everything[:-1].reshape(-1, len(Address))
    addresses[:] = firsts[origin.request]
    addresses[:, Address.LOGITS] += origin.logits * logits.element_size()
    addresses[:, Address.LABELS] += origin.labels * labels.element_size()
    addresses[:, Address.GRAD] += origin.logits * torch.float32.itemsize
    everything[-1] = 0 if total is None else total.data_ptr()
    return everything


def read(plan: Plan, small: npt.NDArray[np.uint8]) -> Values:
    """The values of a batch, from its results."""
    channels, joints, is_hinge = plan.channels, plan.joints, plan.signature.loss.is_hinge
    segments = plan.result("segments", small, len(plan.groups), channels, len(Segment))
    sums = plan.result("cross_sums", small, len(plan.entropies), joints, len(Cross))
    losses = np.ldexp(segments[..., Segment.LOSS].astype(np.float64), segments[..., Segment.UNIT])
    states = segments[..., Segment.STATE]
    largest = (segments[..., Segment.LARGEST] >> 32).astype(np.int32).view(np.float32)
    in_table = plan.groups[:, Group.BINS] > 0
    losses = np.where((states == State.ABSENT) & in_table[:, None], largest, losses)
    terms: list[TermValues] = []
    rows, entropies = iter([*plan.first_rows, len(plan.groups)]), iter(sums)
    stop = next(rows)
    for _, term in plan.signature.loss.terms:
        if isinstance(term, CrossEntropy):
            own = next(entropies)
            mean = np.ascontiguousarray(own[:, Cross.MEAN]).view(np.float64)
            values = np.ldexp(own[:, Cross.SUM].astype(np.float64), own[:, Cross.UNIT])[None] * mean
            terms.append(TermValues(values, np.ones_like(values, np.bool_), per_image=False))
        else:
            start, stop = stop, next(rows)
            scored = states[start:stop].T != State.PASSED_OVER
            terms.append(TermValues(losses[start:stop].T, scored, term.per_image))
    fields = 4 if is_hinge else 2
    counters = plan.result("counters", small, -1)[: joints * fields * channels].reshape(joints, fields, channels)
    predicted, hits = plan.result("predictions", small, joints, 2, channels).astype(np.int64).transpose(1, 2, 0)
    foreground = counters[:, 0].T.astype(np.int64)
    faults = plan.result("faults", small, joints, len(Fault)).T.astype(np.int64)
    return Values(tuple(terms), hits, foreground + predicted - hits, faults)
