"""The internals of our client that the benchmarks use: the bytes that it sends, and where it changes its transport."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from benchmarks.workloads import Regime, Workload
from lovasz import wire
from lovasz.client import LovaszSoftmax, remote
from lovasz.client.tensors import encode_labels
from lovasz.framing import UnaryRequest
from lovasz.spec import weighted_sum

MAX_MESSAGE_BYTES = 4 << 20
"""The largest payload of one message that a server takes."""


def stream_above_bytes() -> int:
    """Requests with a larger payload are streamed."""
    return remote.UNARY_BYTES


def share_above_bytes() -> int:
    """Requests with a larger payload go through shared memory, where there is any."""
    return remote.SHARED_BYTES


@contextmanager
def one_message() -> Iterator[None]:
    """Requests travel in one message meanwhile."""
    with (
        mock.patch.object(remote, "UNARY_BYTES", MAX_MESSAGE_BYTES),
        mock.patch.object(remote, "SHARED_BYTES", MAX_MESSAGE_BYTES),
    ):
        yield


@contextmanager
def stream() -> Iterator[None]:
    """Requests are streamed meanwhile."""
    with mock.patch.object(remote, "UNARY_BYTES", 0):
        yield


@contextmanager
def shared_memory() -> Iterator[None]:
    """Requests go through shared memory meanwhile, if they can."""
    with mock.patch.object(remote, "SHARED_BYTES", 0):
        yield


def payload(logits: Tensor, labels: Tensor) -> list[memoryview]:
    """The bytes that a call sends for these tensors."""
    return [wire.as_bytes(array) for array in (logits.view(torch.uint8).numpy(), encode_labels(labels).array())]


def encoded(workload: Workload, regime: Regime) -> bytes:
    """A request as our client sends it in one message."""
    ((logits, labels),) = workload.inputs(regime)
    target = remote.RemoteTarget("127.0.0.1:1", "grpc", None)  # Never connects.
    try:
        call = target.encode(logits, labels, weighted_sum(LovaszSoftmax()), want_grad=True, joint=None)
        return UnaryRequest(call.request.to_proto(), call.logits, call.labels).encode()
    finally:
        target.close()
