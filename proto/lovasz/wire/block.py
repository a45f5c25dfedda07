"""Where a request has its tensors in one block of memory, on either side: logits, labels, room for the gradient."""

from __future__ import annotations

from typing import NamedTuple

from lovasz.spec import InvalidInput
from lovasz.v1 import loss_pb2 as pb

ALIGNMENT = 64
"""In bytes. In device memory the server takes tensors at multiples of it alone."""


class Places(NamedTuple):
    """Offsets in bytes, and the size of the block."""

    logits: int
    labels: int
    grad: int
    nbytes: int

    @classmethod
    def of(cls, logits: int, labels: int, grad: int) -> Places:
        """Lays out a block for tensors of these sizes in bytes: logits, labels and gradient, each aligned."""
        labels_at = _aligned(logits)
        grad_at = labels_at + _aligned(labels)
        return cls(0, labels_at, grad_at, nbytes=grad_at + _aligned(grad))


class SharedTensors(NamedTuple):
    """Where the tensors of a request are in shared memory.

    Attributes:
        session: the session's name, as the server gave it.
        region: the region's number, as the client gave it.
        logits_offset: in bytes, like the other two.
        labels_offset: where the labels begin.
        grad_offset: where the server writes the gradient.
    """

    session: bytes
    region: int
    logits_offset: int
    labels_offset: int
    grad_offset: int

    def to_proto(self) -> pb.SharedTensors:
        return pb.SharedTensors(
            session=self.session,
            region=self.region,
            logits_offset=self.logits_offset,
            labels_offset=self.labels_offset,
            grad_offset=self.grad_offset,
        )

    @classmethod
    def from_proto(cls, message: pb.SharedTensors) -> SharedTensors:
        return cls(message.session, message.region, message.logits_offset, message.labels_offset, message.grad_offset)


def check_inside(field: str, offset: int, nbytes: int, of_block: int) -> None:
    """Checks that a tensor of ``nbytes`` bytes, at an offset that the other side has named, is inside a block.

    Raises:
        InvalidInput: it is not; ``field`` names the offset.
    """
    if not 0 <= offset <= of_block - nbytes:
        raise InvalidInput(
            field, f"got {offset} for {nbytes} bytes in a region of {of_block}; expected a place within it"
        )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
