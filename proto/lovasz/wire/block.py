"""Where a request has its tensors in one block of memory, on either side: logits, labels, room for the gradient."""

from __future__ import annotations

from typing import NamedTuple

from lovasz.spec import InvalidInput
from lovasz.wire.messages import Request

ALIGNMENT = 64
"""In bytes. In device memory the server takes tensors at multiples of it alone."""


class Places(NamedTuple):
    """Offsets in bytes, and the size of the block."""

    logits: int
    labels: int
    grad: int
    nbytes: int


def places(request: Request) -> Places:
    """Lays out a block for a request: logits, labels and gradient, each aligned."""
    labels = _aligned(request.logits.nbytes)
    grad = labels + _aligned(request.labels.nbytes)
    return Places(0, labels, grad, nbytes=grad + _aligned(request.grad_bytes))


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
