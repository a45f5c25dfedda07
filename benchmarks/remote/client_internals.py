"""The internals of our client that the benchmarks use: the bytes that it sends, and where it changes its transport."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from benchmarks.workloads import Regime, Workload
from lovasz import wire
from lovasz.client import LovaszSoftmax, remote
from lovasz.client.options import ClientOptions, Transport
from lovasz.client.tensors import encode_labels, encode_logits
from lovasz.spec import weighted_sum
from lovasz.v1 import loss_pb2 as pb
from lovasz.wire.framing import UnaryRequest

MAX_MESSAGE_BYTES = 4 << 20
"""The largest payload of one message that a server takes."""


def stream_above_bytes() -> int:
    """Requests with a larger payload are streamed."""
    return remote.UNARY_BYTES


@contextmanager
def _changing(stream_above: int, share_above: int) -> Iterator[None]:
    """Sets both limits meanwhile. (Not by ``mock.patch``, as this is inside of what is timed.)"""
    saved = remote.UNARY_BYTES, remote.SHARED_BYTES
    remote.UNARY_BYTES, remote.SHARED_BYTES = stream_above, share_above
    try:
        yield
    finally:
        remote.UNARY_BYTES, remote.SHARED_BYTES = saved


def one_message() -> AbstractContextManager[None]:
    """Requests of a client that keeps to gRPC travel in one message meanwhile."""
    return _changing(MAX_MESSAGE_BYTES, remote.SHARED_BYTES)


def stream() -> AbstractContextManager[None]:
    """Requests of a client that keeps to gRPC are streamed meanwhile."""
    return _changing(0, remote.SHARED_BYTES)


def payload(logits: Tensor, labels: Tensor) -> list[memoryview]:
    """The bytes that a call sends for these tensors."""
    return [wire.as_bytes(array) for array in (logits.view(torch.uint8).numpy(), encode_labels(labels).array())]


def encoded(workload: Workload, regime: Regime) -> bytes:
    """A request as our client sends it in one message."""
    ((logits, labels),) = workload.inputs(regime)
    target = remote.RemoteTarget("127.0.0.1:1", ClientOptions(transport=Transport.GRPC))  # Never connects.
    try:
        call = target.prepare(
            logits, labels, weighted_sum(LovaszSoftmax()), want_grad=True, joint=None, offsets=None, timeout=60
        )
        return UnaryRequest(call.request.to_proto(), *call.payload).encode()
    finally:
        target.close()


def packet_bytes(workload: Workload, regime: Regime) -> int:
    """The size of a call's packet on the shared-memory socket."""
    ((logits, labels),) = workload.inputs(regime)
    specs = encode_logits(logits).spec, encode_labels(labels).spec
    shared = wire.SharedTensors(bytes(16), 1, 0, specs[0].nbytes, specs[0].nbytes + specs[1].nbytes)
    request = wire.Request.checked(weighted_sum(LovaszSoftmax()), *specs, want_grad=True, shared=shared)
    call = pb.SharedMemoryCall(number=1, header=request.to_proto(), timeout_seconds=60.0)
    return pb.SharedMemoryRequest(call=call).ByteSize()
