"""Copies a payload to the GPU while the rest of it is still being received."""

from __future__ import annotations

from contextlib import nullcontext

import torch

UPLOAD_BYTES = 4 << 20
"""A payload is copied to the GPU in pieces of at least this size."""


class Upload:
    """Copies a payload to a device while the rest is received, on a stream of its own.

    Attributes:
        targets: the tensors on the device.
    """

    def __init__(self, sources: tuple[torch.Tensor, ...], device: torch.device) -> None:
        self._sources = sources
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with self._on_stream():
            self.targets = tuple(torch.empty_like(source, device=device) for source in sources)
        self._ready: torch.cuda.Event | None = None
        self._copied = 0

    @classmethod
    def begin(cls, sources: tuple[torch.Tensor, ...], device: torch.device) -> Upload | None:
        """None if the device has no memory for it at the moment; then the engine copies when it starts the batch."""
        try:
            return cls(sources, device)
        except torch.OutOfMemoryError:
            return None

    def advance(self, received: int) -> None:
        """Copies what has been received so far if that is enough to be worth a copy.

        Args:
            received: bytes, counted over all sources.
        """
        if received - self._copied >= UPLOAD_BYTES:
            self._copy(received)

    def finish(self) -> None:
        """Copies the rest."""
        self._copy(sum(source.nbytes for source in self._sources))
        if self._stream is not None:
            self._ready = self._stream.record_event()

    def hand_over(self, stream: torch.cuda.Stream | None) -> None:
        """Lets the work queued on this stream from now on use the targets, once they are complete."""
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
