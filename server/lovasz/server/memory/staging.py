"""Host memory that receives the payload of one request, and from which its gradient is sent."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lovasz import wire
from lovasz.core.batch import Request
from lovasz.server.memory.pool import StagingPool
from lovasz.server.memory.upload import Upload
from lovasz.wire.framing import Bytes


class Staging:
    """The tensors of one request in one buffer: its logits, its labels, and room for its gradient.

    Attributes:
        grad: the gradient as it is sent, in the element type and shape of the logits; None if none is wanted.
        upload: copies the payload to the GPU; None on a CPU.
    """

    def __init__(self, header: wire.Request, pool: StagingPool) -> None:
        """Takes a buffer from the pool.

        Raises:
            MemoryError, RuntimeError: there is no memory left.
        """
        self._header, self._pool, self._is_abandoned = header, pool, False
        place = wire.places(header)
        buffer = self._buffer = pool.take(place.nbytes)
        self._logits = buffer[place.logits : place.logits + header.logits.nbytes]
        self._labels = buffer[place.labels : place.labels + header.labels.nbytes]
        grad = buffer[place.grad : place.grad + header.grad_bytes]
        self.grad = _typed(grad, header.logits) if header.want_grad else None
        self.upload = Upload.begin((self._logits, self._labels), pool.device) if pool.device.type == "cuda" else None

    def receive(self, chunks: Iterable[Bytes]) -> None:
        """Copies the whole payload, logits and then labels, to its place.

        Raises:
            InvalidInput: there are more or fewer bytes than the header declared.
        """
        assembly = self.assembly()
        for chunk in chunks:
            self.add(assembly, chunk)
        self.finish(assembly)

    def assembly(self) -> wire.Assembly:
        """For :meth:`add` and :meth:`finish`: knows how much of the payload has come."""
        return wire.Assembly([self._logits.numpy().data, self._labels.numpy().data])

    def add(self, assembly: wire.Assembly, chunk: Bytes) -> None:
        """Copies the next bytes of the payload to their place."""
        assembly.add(chunk)
        if self.upload is not None:
            self.upload.advance(assembly.received)

    def finish(self, assembly: wire.Assembly) -> None:
        """The payload has come.

        Raises:
            InvalidInput: it is shorter than the header declared.
        """
        assembly.finish()
        if self.upload is not None:
            self.upload.finish()

    def hand_over(self, stream: torch.cuda.Stream | None) -> None:
        """Lets the work queued on this stream from now on use the tensors, once they are complete."""
        if self.upload is not None:
            self.upload.hand_over(stream)

    def request(self) -> Request:
        """The tensors as the core takes them."""
        logits, labels = (self._logits, self._labels) if self.upload is None else self.upload.targets
        # The core computes in float32. A gradient in 16 bits is rounded afterwards, when it is copied to its place.
        grad = self.grad if self.grad is not None and self.grad.dtype == torch.float32 else None
        return Request(
            _typed(logits, self._header.logits), _typed(labels, self._header.labels), self._header.layout, grad
        )

    def release(self) -> None:
        """Gives the buffer back. Nothing may use the tensors any more."""
        if not self._is_abandoned:
            self._pool.give(self._buffer)

    def abandon(self) -> None:
        """A device that is stuck may still write to the tensors: the buffer is never used again."""
        self._is_abandoned = True


def _typed(data: torch.Tensor, spec: wire.TensorSpec) -> torch.Tensor:
    return data.view(getattr(torch, spec.dtype.name)).view(spec.shape)
