"""Memory for tensors that is used again: fresh memory has to be mapped page by page, which takes longer than a copy."""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

KEPT = 4
"""Idle pieces of memory that are kept. A step takes up to three: logits and gradient in 16 bits, and the gradient."""
_ROOM = 2
"""An idle piece is not used for what is so many times smaller."""


class Memory:
    """A piece of memory of this process."""

    def __init__(self, nbytes: int) -> None:
        """
        Raises:
            OSError: there is no memory left.
        """
        self.map = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.map.madvise(mmap.MADV_HUGEPAGE)

    @property
    def nbytes(self) -> int:
        return len(self.map)

    def array(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """A part of it, as long as nobody else uses it."""
        return np.frombuffer(self.map, dtype, math.prod(shape), offset).reshape(shape)

    def close(self) -> None:
        """Lets it go; the arrays that are left keep their memory."""


MemoryT = TypeVar("MemoryT", bound=Memory)


class MemoryPool(Generic[MemoryT]):
    """Pieces of memory, each in use by one call or one gradient, or idle."""

    def __init__(self, make: Callable[[int], MemoryT]) -> None:
        """
        Args:
            make: makes a piece of so many bytes.
        """
        self._make = make
        # Without a lock: the collector of garbage may give a piece back at any place of any thread.
        self._idle: deque[MemoryT] = deque()

    def take(self, nbytes: int) -> MemoryT:
        """A piece of at least so many bytes."""
        idle = []
        while self._idle:
            try:
                idle.append(self._idle.popleft())
            except IndexError:  # Another thread was faster.
                break
        idle.sort(key=lambda memory: memory.nbytes)
        fitting = next((m for m in idle if nbytes <= m.nbytes <= _ROOM * nbytes), None)
        kept = [memory for memory in idle if memory is not fitting]
        dropped = max(0, len(kept) - KEPT)
        for memory in kept[:dropped]:
            memory.close()
        self._idle.extend(kept[dropped:])
        return self._make(nbytes) if fitting is None else fitting

    def give(self, memory: MemoryT) -> None:
        """Takes a piece back."""
        self._idle.append(memory)

    def lend(self, memory: MemoryT, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """A part of a piece as an array; the piece comes back when the last view of the array is gone."""
        # What a view of a view keeps is not the view but the object that the memory comes from.
        owner: Any = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_buffer(memory.map, offset)
        weakref.finalize(owner, self._idle.append, memory).atexit = False
        array: npt.NDArray[Any] = np.frombuffer(owner, dtype)
        return array.reshape(shape)

    def new(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """An array in a piece of its own, which comes back like those that are lent."""
        return self.lend(self.take(math.prod(shape) * dtype.itemsize), 0, shape, dtype)

    def close(self) -> None:
        """Lets go of what is idle."""
        while self._idle:
            self._idle.pop().close()
