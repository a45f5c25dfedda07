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

from lovasz.core.computed import Computed, TermValues, Values
from lovasz.core.ragged import Batch, Request
from lovasz.core.triton_kernels.columns import Address, Cross, Fault, Group, Segment, State
from lovasz.core.triton_kernels.plan import Plan, Signature, to_device
from lovasz.spec import CrossEntropy, WeightedSum

KEPT_PLANS = 64
"""Plans of the latest signatures; each takes some hundred kilobytes of the device's memory."""

_plans: OrderedDict[Signature, Plan] = OrderedDict()
_plans_lock = threading.Lock()


Tensors = Sequence[tuple[Tensor, Tensor]]
"""Logits and labels of each request, on the device."""
Grads = tuple[Tensor, ...] | None


def compute(batch: Batch, loss: WeightedSum, device: torch.device, *, want_grad: bool) -> Computed:
    """Queues the computation of a batch (not of float64)."""
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with torch.no_grad(), current:  # Triton launches on the current device.
        plan, tensors, grads = prepare(batch, loss, device, want_grad=want_grad)
        small = plan.queue(to_device(torch.from_numpy(addresses_of(plan, tensors, grads)), device))
        return Computed(grads, _reader(plan, small))


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
    plan = plan_of(Signature(loss, layouts, batch.sizes, logits.dtype, labels.dtype, want_grad, device))
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


def _on_device(request: Request, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits and labels on the device; what is there already and contiguous stays where it is."""
    logits = request.logits.detach().to(device, non_blocking=True).contiguous()
    labels = request.labels.to(device, non_blocking=True).contiguous()
    return logits, labels.view(torch.uint8) if labels.dtype == torch.bool else labels


def addresses_of(plan: Plan, tensors: Tensors, grads: Grads) -> npt.NDArray[np.int64]:
    """Of each plane: :class:`Address`."""
    (logits, labels), *_ = tensors
    firsts = np.array([(logits.data_ptr(), labels.data_ptr(), 0) for logits, labels in tensors], np.int64)
    if grads is not None:
        firsts[:, Address.GRAD] = [grad.data_ptr() for grad in grads]
    origin = plan.origin
    addresses = firsts[origin.request]
    addresses[:, Address.LOGITS] += origin.logits * logits.element_size()
    addresses[:, Address.LABELS] += origin.labels * labels.element_size()
    addresses[:, Address.GRAD] += origin.logits * torch.float32.itemsize
    return addresses


def _reader(plan: Plan, small: Tensor) -> Callable[[], Values]:
    """Queues the one copy to the host; the values wait for it."""
    if not small.is_cuda:
        return lambda: read(plan, small.numpy())
    on_host = torch.empty(small.shape, dtype=torch.uint8, pin_memory=True)
    on_host.copy_(small, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> Values:
        copied.synchronize()
        return read(plan, on_host.numpy())

    return wait


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
