"""Reused memory for tensors. The kernel maps new memory page by page, which takes longer than a copy."""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from operator import attrgetter
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from lovasz import wire
from lovasz.client.tensors import Outgoing

KEPT = 4
"""Idle blocks that are kept. A step needs up to three: logits and gradient in 16 bits, and the gradient in 32."""
_MAX_RATIO = 2
"""An idle block is not used for a request that is smaller by more than this factor."""
SMALL_BYTES = 64 << 10
"""Arrays of at most this size need no pool: the C library keeps memory for them."""
_SIZE = attrgetter("nbytes")
_ANONYMOUS = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
"""Windows has no such flags."""


class Memory:
    """A block of memory of this process.

    Attributes:
        nbytes: its size.
    """

    def __init__(self, nbytes: int) -> None:
        """Allocates the block.

        Raises:
            OSError: there is no memory left.
        """
        self.nbytes = nbytes
        self.map = mmap.mmap(-1, nbytes, **_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.map.madvise(mmap.MADV_HUGEPAGE)

    def array(self, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """A part of the block as an array. The caller must know that nothing else uses that part."""
        array: npt.NDArray[Any] = np.ndarray(shape, dtype, self.map, offset)
        return array

    def write(self, offset: int, tensor: Outgoing) -> memoryview:
        """Copies a tensor to its place; returns its bytes there."""
        array = self.array(offset, tensor.source.shape, tensor.dtype.numpy)
        tensor.write(array)
        return wire.as_bytes(array)

    def close(self) -> None:
        """Frees the block; arrays in it stay valid."""


class Block(Protocol):
    """What a pool holds."""

    @property
    def nbytes(self) -> int:
        """Its size."""

    def close(self) -> None:
        """Frees it."""


BlockT = TypeVar("BlockT", bound=Block)
MemoryT = TypeVar("MemoryT", bound=Memory)


class Pool(Generic[BlockT]):
    """Blocks, each idle or in use by one call or one gradient."""

    def __init__(self, make: Callable[[int], BlockT], *, most_idle: int | None = None) -> None:
        """Creates an empty pool.

        Args:
            make: allocates a block, given its size in bytes.
            most_idle: more idle blocks than these are dropped when one is given back; None: when the next one is taken,
                as they have to be closed, which the garbage collector must not do.
        """
        self._make, self._most_idle = make, most_idle
        # No lock: the garbage collector may return a block at any point of any thread.
        self._idle: deque[BlockT] = deque()
        self._closed = False

    def take(self, nbytes: int) -> BlockT:
        """A block of at least ``nbytes`` bytes."""
        idle = []
        while self._idle:
            try:
                idle.append(self._idle.popleft())
            except IndexError:  # Another thread took the last one.
                break
        idle.sort(key=_SIZE)
        fitting = None
        for i, block in enumerate(idle):
            if nbytes <= block.nbytes <= _MAX_RATIO * nbytes:
                fitting = idle.pop(i)
                break
        for block in idle[:-KEPT]:
            block.close()
        self._idle.extend(idle[-KEPT:])
        return self._make(nbytes) if fitting is None else fitting

    def give(self, memory: BlockT) -> None:
        """Returns a block to the pool. A closed pool only drops it: the garbage collector may call this."""
        self._idle.append(memory)
        if self._closed:
            self._idle.clear()
        while self._most_idle is not None and len(self._idle) > self._most_idle:
            with suppress(IndexError):  # Another thread took some.
                self._idle.popleft()

    def clear(self) -> None:
        """Frees the idle blocks."""
        while self._idle:
            self._idle.pop().close()

    def close(self) -> None:
        """Frees the idle blocks, and keeps none from now on."""
        self._closed = True
        self.clear()


class MemoryPool(Pool[MemoryT]):
    """Blocks of this process's memory, which arrays can have parts of."""

    def lend(self, memory: MemoryT, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """A part of a block as an array; the block returns to the pool when the array's last view is gone."""
        # A view of a view keeps a reference to the object that owns the memory, not to the first view.
        owner: Any = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_buffer(memory.map, offset)
        weakref.finalize(owner, self.give, memory).atexit = False
        array: npt.NDArray[Any] = np.frombuffer(owner, dtype)
        return array.reshape(shape)

    def new(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """An array; a large one with a block of its own, which returns to the pool when its last view is gone."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes <= SMALL_BYTES:
            return np.empty(shape, dtype)
        return self.lend(self.take(nbytes), 0, shape, dtype)
