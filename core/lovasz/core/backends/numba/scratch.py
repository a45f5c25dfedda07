"""Buffers that calls reuse, since the system has to map new memory page by page."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

KEPT_BYTES = 512 << 20
"""The most scratch that is kept after a call; if it is larger, all of it is freed."""


class Scratch:
    """Named buffers of one call. Their contents are undefined, except tables, which are all 0 between calls."""

    def __init__(self) -> None:
        self._buffers: dict[str, npt.NDArray[np.uint8]] = {}
        self._last: dict[str, tuple[tuple[int, ...], npt.NDArray[Any]]] = {}

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def array(self, name: str, shape: tuple[int, ...], dtype: Any, *, zero: bool = False) -> npt.NDArray[Any]:
        """An array in the buffer of this name; the buffer is made or replaced if it is too small.

        Args:
            zero: whether a new buffer is filled with 0.
        """
        last = self._last.get(name)
        if last is not None and last[0] == shape and last[1].dtype == dtype:
            return last[1]
        size = prod(shape) * np.dtype(dtype).itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < size:
            self._last.pop(name, None)
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = (np.zeros if zero else np.empty)(size, np.uint8)
        array = buffer[:size].view(dtype).reshape(shape)
        self._last[name] = shape, array
        return array


class ScratchPool:
    """Keeps the scratch of one call for the next; each of several concurrent calls has its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: Scratch | None = None

    @contextmanager
    def borrow(self) -> Iterator[Scratch]:
        with self._lock:
            scratch, self._idle = self._idle or Scratch(), None
        yield scratch  # It is not kept after an error, since its tables may not be all 0.
        if scratch.nbytes <= KEPT_BYTES:
            with self._lock:
                self._idle = scratch


SCRATCH = ScratchPool()
