"""Buffers that are used again: memory that the system hands out anew has to be mapped page by page."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

KEPT_BYTES = 512 << 20
"""Scratch that is larger than this after a call is given back to the system."""


class Scratch:
    """Named buffers of one call; what stands in them is left over, but for tables, which are all 0 between calls."""

    def __init__(self) -> None:
        self._buffers: dict[str, npt.NDArray[np.uint8]] = {}

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def array(self, name: str, shape: tuple[int, ...], dtype: Any, *, zero: bool = False) -> npt.NDArray[Any]:
        """An array in a buffer of its own.

        Args:
            zero: whether the buffer is to be all 0 when it is new.
        """
        size = prod(shape) * np.dtype(dtype).itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < size:
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = (np.zeros if zero else np.empty)(size, np.uint8)
        return buffer[:size].view(dtype).reshape(shape)


class ScratchPool:
    """Keeps the scratch of the last call for the next; calls at the same time have each their own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: Scratch | None = None

    @contextmanager
    def borrow(self) -> Iterator[Scratch]:
        with self._lock:
            scratch, self._idle = self._idle or Scratch(), None
        yield scratch  # After an error it is not kept: tables may not be all 0.
        if scratch.nbytes <= KEPT_BYTES:
            with self._lock:
                self._idle = scratch


SCRATCH = ScratchPool()
