"""Random tensors, and the messages that carry them to the service."""

from __future__ import annotations

import numpy as np

from lovasz import wire
from lovasz.spec import LovaszSoftmax, weighted_sum
from lovasz.v1 import loss_pb2 as pb

LOSS = LovaszSoftmax()


def tensors(side: int, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Logits (1, classes, side, side) and labels (1, side, side); the same ones for each size."""
    random = np.random.RandomState(side)
    logits = random.randn(1, classes, side, side).astype(np.float32)
    return logits, random.randint(0, classes, (1, side, side)).astype(np.uint8)


def header_of(logits: np.ndarray, labels: np.ndarray, *, joint: wire.Joint | None = None) -> pb.RequestHeader:
    first, second = (wire.TensorSpec(wire.dtype_named(array.dtype.name), array.shape) for array in (logits, labels))
    return wire.Request.checked(weighted_sum(LOSS), first, second, want_grad=True, joint=joint).to_proto()


def request_of(logits: np.ndarray, labels: np.ndarray, *, joint: wire.Joint | None = None) -> pb.ComputeRequest:
    """One message with everything."""
    header = header_of(logits, labels, joint=joint)
    return pb.ComputeRequest(header=header, logits=logits.tobytes(), labels=labels.tobytes())


def messages_of(logits: np.ndarray, labels: np.ndarray) -> list[pb.ComputeStreamRequest]:
    """The messages of a stream: a header, then chunks."""
    chunks = wire.chunks([wire.as_bytes(logits), wire.as_bytes(labels)])
    return [
        pb.ComputeStreamRequest(header=header_of(logits, labels)),
        *(pb.ComputeStreamRequest(chunk=bytes(chunk)) for chunk in chunks),
    ]
