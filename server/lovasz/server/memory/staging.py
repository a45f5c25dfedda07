"""Host memory into which the payload of one request is received, and from which its gradient is sent."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from contextlib import nullcontext

import numpy as np
import torch

from lovasz import wire
from lovasz.core.batch import Request
from lovasz.wire.framing import Bytes

KEPT_BYTES = 512 << 20
"""Idle buffers are kept up to this, for the next requests: fresh memory has to be mapped page by page."""
KEPT_SECONDS = 10.0
"""An idle buffer is given back to the system after this."""
UPLOAD_BYTES = 4 << 20
"""What has been received is copied to a GPU in pieces of at least this."""

_ALIGNMENT = 64
_LARGE_BYTES = 1 << 16
"""Smaller buffers are not kept: the allocator does that."""


class StagingPool:
    """Buffers that are used again; pinned where they are copied to a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._idle: list[tuple[float, torch.Tensor]] = []

    @property
    def idle_bytes(self) -> int:
        with self._lock:
            return sum(buffer.nbytes for _, buffer in self._idle)

    def take(self, nbytes: int) -> torch.Tensor:
        """A buffer of at least so many bytes, uint8; what stands in it is left over.

        Raises:
            MemoryError, RuntimeError: there is no memory left.
        """
        size = _size_class(nbytes)
        with self._lock:
            for place in range(len(self._idle) - 1, -1, -1):
                if self._idle[place][1].nbytes == size:
                    return self._idle.pop(place)[1]
        if self.device.type == "cuda":
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return torch.from_numpy(np.empty(size, np.uint8))  # Of NumPy, as it asks the system for large pages.

    def give(self, buffer: torch.Tensor) -> None:
        """Takes back a buffer that nobody writes to or reads any more."""
        if not _LARGE_BYTES <= buffer.nbytes <= KEPT_BYTES:
            return
        with self._lock:
            self._idle.append((time.monotonic(), buffer))
            kept = sum(buffer.nbytes for _, buffer in self._idle)
            while kept > KEPT_BYTES:
                kept -= self._idle.pop(0)[1].nbytes

    def trim(self) -> None:
        """Gives back to the system what has been idle for long."""
        until = time.monotonic() - KEPT_SECONDS
        with self._lock:
            self._idle = [(since, buffer) for since, buffer in self._idle if since > until]


def _size_class(nbytes: int) -> int:
    """The size of the buffer for so many bytes: up to an eighth more, so that requests of similar size share one."""
    step = max(_ALIGNMENT, 1 << max(0, nbytes.bit_length() - 4))
    return max(1, -(-nbytes // step)) * step


class Staging:
    """The tensors of one request, in one buffer: its logits, its labels, and room for its gradient.

    Attributes:
        grad: the gradient as it is sent, in the element type and shape of the logits; None if none is wanted.
        upload: the copy to the GPU that goes on while the rest is received; None on a CPU.
    """

    def __init__(self, header: wire.Request, pool: StagingPool) -> None:
        """
        Raises:
            MemoryError, RuntimeError: there is no memory left.
        """
        self._header, self._pool = header, pool
        sizes = (header.logits.nbytes, header.labels.nbytes, header.grad_bytes)
        places = [0]
        for size in sizes:
            places.append(-(-(places[-1] + size) // _ALIGNMENT) * _ALIGNMENT)
        buffer = self._buffer = pool.take(places[-1])
        self._logits, self._labels, grad = (
            buffer[place : place + size] for place, size in zip(places, sizes, strict=False)
        )
        self.grad = _typed(grad, header.logits) if header.want_grad else None
        self.upload = Upload.begin((self._logits, self._labels), pool.device) if pool.device.type == "cuda" else None

    def receive(self, chunks: Iterable[Bytes]) -> None:
        """Copies the payload, logits and then labels, to its place.

        Raises:
            InvalidInput: there are more or fewer bytes than the header declared.
        """
        assembly = self.assembly()
        for chunk in chunks:
            self.add(assembly, chunk)
        self.finish(assembly)

    def assembly(self) -> wire.Assembly:
        """What :meth:`add` puts chunks into."""
        return wire.Assembly([self._logits.numpy().data, self._labels.numpy().data])

    def add(self, assembly: wire.Assembly, chunk: Bytes) -> None:
        """Copies the next bytes of the payload to their place."""
        assembly.add(chunk)
        if self.upload is not None:
            self.upload.advance(assembly.received)

    def finish(self, assembly: wire.Assembly) -> None:
        assembly.finish()
        if self.upload is not None:
            self.upload.finish()

    def request(self) -> Request:
        """The tensors as the core takes them."""
        logits, labels = (self._logits, self._labels) if self.upload is None else self.upload.targets
        # The core computes in float32; a gradient in 16 bits is rounded to its place afterwards.
        grad = self.grad if self.grad is not None and self.grad.dtype == torch.float32 else None
        return Request(
            _typed(logits, self._header.logits), _typed(labels, self._header.labels), self._header.layout, grad
        )

    def release(self) -> None:
        """Gives the buffer back; nothing may write to it or read it any more."""
        self._pool.give(self._buffer)


def _typed(data: torch.Tensor, spec: wire.TensorSpec) -> torch.Tensor:
    return data.view(getattr(torch, spec.dtype.name)).view(spec.shape)


class Upload:
    """Copies a payload to a device while it is still being received, on a stream of its own."""

    def __init__(self, sources: tuple[torch.Tensor, ...], device: torch.device) -> None:
        self._sources = sources
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with self._on_stream():
            self.targets = tuple(torch.empty_like(source, device=device) for source in sources)
        self._ready: torch.cuda.Event | None = None
        self._copied = 0

    @classmethod
    def begin(cls, sources: tuple[torch.Tensor, ...], device: torch.device) -> Upload | None:
        """None if the device has no memory for it at the moment: the engine copies, in its turn."""
        try:
            return cls(sources, device)
        except torch.OutOfMemoryError:
            return None

    def advance(self, received: int) -> None:
        """Copies what has been received, counted over all sources, if it is worth a copy."""
        if received - self._copied >= UPLOAD_BYTES:
            self._copy(received)

    def finish(self) -> None:
        """Copies the rest."""
        self._copy(sum(source.nbytes for source in self._sources))
        if self._stream is not None:
            self._ready = self._stream.record_event()

    def hand_over(self, stream: torch.cuda.Stream | None) -> None:
        """Lets what is queued on this stream from now on wait for the copy, and use the targets."""
        if stream is not None and self._ready is not None:
            stream.wait_event(self._ready)
            for target in self.targets:
                target.record_stream(stream)

    def _copy(self, until: int) -> None:
        first = 0
        with self._on_stream():
            for source, target in zip(self._sources, self.targets, strict=True):
                start, stop = max(self._copied - first, 0), min(until - first, source.nbytes)
                if start < stop:
                    target[start:stop].copy_(source[start:stop], non_blocking=True)
                first += source.nbytes
        self._copied = until

    def _on_stream(self) -> torch.cuda.StreamContext | nullcontext[None]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
