"""Memory of the host that receives the payload of one request, and from which its gradient is sent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
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
        place = self._places = header.places
        buffer = self._buffer = pool.take(place.nbytes)
        # Views by NumPy: those of torch take several times as long to make.
        data = self._data = buffer.numpy()
        self._logits = data[place.logits : place.logits + header.logits.nbytes]
        self._labels = data[place.labels : place.labels + header.labels.nbytes]
        self.grad = typed(data, place.grad, header.logits) if header.want_grad else None
        self.upload: Upload | None = None
        if pool.device.type == "cuda":
            sources = torch.from_numpy(self._logits), torch.from_numpy(self._labels)
            self.upload = Upload.begin(sources, pool.device)

    def receive(self, chunks: Sequence[Bytes]) -> None:
        """Copies the whole payload, logits and then labels, to its place.

        Raises:
            InvalidInput: there are more or fewer bytes than the header declared.
        """
        places = self._logits, self._labels
        if self.upload is None and list(map(len, chunks)) == list(map(len, places)):
            for place, chunk in zip(places, chunks, strict=True):
                if len(chunk):
                    place[:] = np.frombuffer(chunk, np.uint8)  # NumPy releases the interpreter lock while it copies.
            return
        assembly = self.assembly()
        for chunk in chunks:
            self.add(assembly, chunk)
        self.finish(assembly)

    def assembly(self) -> wire.Assembly:
        """For :meth:`add` and :meth:`finish`: knows how much of the payload has come."""
        return wire.Assembly([self._logits.data, self._labels.data])

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
        header = self._header
        if self.upload is None:
            logits = typed(self._data, self._places.logits, header.logits)
            labels = typed(self._data, self._places.labels, header.labels)
        else:
            logits, labels = (
                target.view(getattr(torch, one.dtype.name)).view(one.shape)
                for target, one in zip(self.upload.targets, (header.logits, header.labels), strict=True)
            )
        return Request(logits, labels, header.layout, room_for_core(self.grad))

    def release(self) -> None:
        """Gives the buffer back. Nothing may use the tensors any more."""
        if not self._is_abandoned:
            self._pool.give(self._buffer)

    def abandon(self) -> None:
        """A device that is stuck may still write to the tensors: the buffer is never used again."""
        self._is_abandoned = True


def room_for_core(grad: torch.Tensor | None) -> torch.Tensor | None:
    """Where the core can write the gradient itself; None: elsewhere.

    It computes in float32. A gradient in 16 bits is rounded afterwards, when it is copied to its place.
    """
    return grad if grad is not None and grad.dtype == torch.float32 else None


def typed(data: npt.NDArray[np.uint8] | memoryview, place: int, spec: wire.TensorSpec) -> torch.Tensor:
    """The tensor at a place of a buffer."""
    if spec.dtype.name == "bfloat16":  # NumPy has none.
        return torch.from_numpy(np.ndarray(spec.shape, np.int16, data, place)).view(torch.bfloat16)
    return torch.from_numpy(np.ndarray(spec.shape, spec.dtype.numpy, data, place))
