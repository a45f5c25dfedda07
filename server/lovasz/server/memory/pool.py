"""Buffers in host memory, kept for the next requests."""

from __future__ import annotations

import threading
import time

import numpy as np
import torch

KEPT_BYTES = 512 << 20
"""Idle buffers are kept up to this total: fresh memory has to be mapped page by page."""
KEPT_SECONDS = 10.0
"""How long an idle buffer is kept."""

_SMALLEST_STEP = 64
_LARGE_BYTES = 1 << 16
"""Smaller buffers are not kept: the C library's allocator keeps them."""


class StagingPool:
    """Buffers that are reused; pinned if the device is a GPU.

    Attributes:
        device: the one that computes.
        copy_stream: on which memory of the device is copied, apart from computations; None on a CPU, which has none.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lock = threading.Lock()
        self._idle: list[tuple[float, torch.Tensor]] = []

    @property
    def idle_bytes(self) -> int:
        """Bytes of the buffers that wait for requests."""
        with self._lock:
            return sum(buffer.nbytes for _, buffer in self._idle)

    def take(self, nbytes: int) -> torch.Tensor:
        """A buffer of at least this size, uint8; its contents are undefined.

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
        return torch.from_numpy(np.empty(size, np.uint8))  # By NumPy, as it asks the system for large pages.

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
        """A chore: gives buffers that have been idle for long back to the system."""
        until = time.monotonic() - KEPT_SECONDS
        with self._lock:
            self._idle = [(since, buffer) for since, buffer in self._idle if since > until]


def _size_class(nbytes: int) -> int:
    """The size of the buffer: up to an eighth more than needed, so that requests of similar size share buffers."""
    step = max(_SMALLEST_STEP, 1 << max(0, nbytes.bit_length() - 4))
    return max(1, -(-nbytes // step)) * step
