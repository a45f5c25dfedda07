"""The tensors of one request in memory of the host that its caller shares: used where they are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lovasz import wire
from lovasz.core.batch import Request
from lovasz.server.memory.pool import StagingPool
from lovasz.server.memory.staging import room_for_core, typed


class RegionStaging:
    """Reads the logits where the caller has put them, and has the gradient written where the caller wants it.

    The labels alone are copied. The caller can change its memory at any time, and a label that changes while a loop
    reads it could make it access memory out of bounds. Logits and gradients that change make only the caller's own
    answer wrong: no loop uses them as an index.

    Attributes:
        grad: the gradient in the caller's memory, in the element type and shape of the logits; None if none is wanted.
    """

    def __init__(self, header: wire.Request, pool: StagingPool) -> None:
        """Takes no memory yet; the pool is that of a CPU."""
        self._header = header
        self.grad: torch.Tensor | None = None

    def receive(self, sources: Sequence[memoryview]) -> None:
        """Copies the labels; from now on the caller must not change the rest.

        Args:
            sources: logits, labels, and room for the gradient, each of them at a multiple of ``wire.ALIGNMENT``.
        """
        header = self._header
        logits, labels, grad = sources
        self._logits = typed(logits, 0, header.logits)
        self._labels = typed(np.frombuffer(labels, np.uint8).copy(), 0, header.labels)
        self.grad = typed(grad, 0, header.logits) if header.want_grad else None

    def request(self) -> Request:
        """The tensors as the core takes them."""
        return Request(self._logits, self._labels, self._header.layout, room_for_core(self.grad))

    def hand_over(self, stream: torch.cuda.Stream | None) -> None:
        """Nothing to do: a CPU has no streams."""

    def release(self) -> None:
        """Nothing may use the tensors any more; the memory is unmapped once nothing refers to it."""

    def abandon(self) -> None:
        """A device that is stuck may still use the tensors: the engine refers to them, so they stay mapped."""
