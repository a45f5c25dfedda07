"""Memory of the engine's device that receives a request from device memory which its caller shares."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from lovasz import wire
from lovasz.core.batch import Request
from lovasz.device_memory.mapping import Mapping
from lovasz.server.memory.pool import StagingPool
from lovasz.spec import InvalidInput


class DeviceBytes:
    """The bytes of one tensor in device memory that a caller shares.

    Attributes:
        nbytes: their number.
    """

    def __init__(self, mapping: Mapping, field: str, offset: int, nbytes: int) -> None:
        """Checks that they are inside the memory.

        Args:
            field: names the offset in errors.

        Raises:
            InvalidInput: they are not, or do not begin at a multiple of 64 bytes.
        """
        wire.check_inside(field, offset, nbytes, mapping.nbytes)
        if offset % wire.ALIGNMENT:
            raise InvalidInput(field, f"got {offset} in device memory; expected a multiple of {wire.ALIGNMENT}")
        self._mapping, self._address, self.nbytes = mapping, mapping.address + offset, nbytes

    def read(self, target: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
        """Queues a copy to a contiguous tensor of as many bytes, on a stream of the device that computes."""
        self._copy(target.data_ptr(), self._address, stream)

    def write(self, source: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
        """Copies a contiguous tensor of as many bytes, which is complete, and waits until that is done."""
        self._copy(self._address, source.data_ptr(), stream)
        if stream is not None:
            stream.synchronize()

    def _copy(self, target: int, source: int, stream: torch.cuda.Stream | None) -> None:
        if self.nbytes:
            number = 0 if stream is None else stream.cuda_stream
            self._mapping.driver.copy(target, source, self.nbytes, self._mapping.device, number)


class DeviceStaging:
    """The tensors of one request on the device, copied from memory that its caller can change at any time.

    The gradient stays where the backend writes it.
    """

    def __init__(self, header: wire.Request, pool: StagingPool) -> None:
        """Allocates memory.

        Raises:
            torch.OutOfMemoryError: the device has none left.
        """
        self._header = header
        self._stream = pool.copy_stream
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            self._logits, self._labels = (
                torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype.name), device=pool.device)
                for tensor in (header.logits, header.labels)
            )

    def receive(self, sources: Sequence[DeviceBytes]) -> None:
        """Copies the tensors, and waits until that is done: the caller may then do with its memory what it likes."""
        try:
            for source, target in zip(sources, (self._logits, self._labels), strict=True):
                source.read(target, self._stream)
        finally:
            if self._stream is not None:
                self._stream.synchronize()

    def request(self) -> Request:
        """The tensors as the core takes them."""
        return Request(self._logits, self._labels, self._header.layout)

    def hand_over(self, stream: torch.cuda.Stream | None) -> None:
        """Lets the work queued on this stream from now on use the tensors."""
        if stream is not None:
            self._logits.record_stream(stream)
            self._labels.record_stream(stream)

    def release(self) -> None:
        """Nothing may use the tensors any more; torch takes their memory back once nothing refers to them."""

    def abandon(self) -> None:
        """A device that is stuck may still use the tensors: the engine refers to them, so torch keeps them."""
