"""Buffers that calls reuse, since the system has to map new memory page by page, and to fill it with zeros."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from math import prod
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

KEPT_BYTES = 512 << 20
"""The most scratch that is kept after a call; if it is larger, all of it is freed."""

KEPT_KINDS = 8
"""The most views that are kept under a name, those used last: calls of so many kinds may come in turn."""


MadeT = TypeVar("MadeT")


class Scratch:
    """Named buffers of one call. Their contents are undefined, except tables, which are all 0 between calls.

    Attributes:
        nbytes: the size of all buffers.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._buffers: dict[str, npt.NDArray[np.uint8]] = {}
        self._arrays: dict[str, dict[tuple[tuple[int, ...], Any], npt.NDArray[Any]]] = {}
        self._made: dict[str, dict[tuple[object, ...], Any]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: Any, *, zero: bool = False) -> npt.NDArray[Any]:
        """An array in the buffer of this name; the buffer is made or replaced if it is too small.

        Args:
            zero: whether a new buffer is filled with 0.
        """
        arrays, key = self._arrays.setdefault(name, {}), (shape, dtype)
        array = arrays.pop(key, None)
        if array is not None:
            arrays[key] = array  # At the end: it is the one used last.
            return array
        size = prod(shape) * np.dtype(dtype).itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < size:
            arrays.clear()
            for made in self._made.values():
                made.clear()  # They may be views of the old buffer.
            self.nbytes -= 0 if buffer is None else buffer.nbytes
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = (np.zeros if zero else np.empty)(size, np.uint8)
            self.nbytes += size
        array = buffer[:size].view(dtype).reshape(shape)
        _keep(arrays, key, array)
        return array

    def kept(self, name: str, key: tuple[object, ...], make: Callable[[], MadeT]) -> MadeT:
        """What ``make`` returned for this key, if it is one of the last keys of this name: views of buffers, made once.

        Args:
            key: what the views depend on. Objects without equality of their own are the same if they are identical.
        """
        all_made = self._made.setdefault(name, {})
        made: MadeT | None = all_made.pop(key, None)
        if made is not None:
            all_made[key] = made
            return made
        made = make()
        _keep(all_made, key, made)
        return made


def _keep(views: dict[Any, Any], key: object, view: object) -> None:
    """Adds a view; if there are too many, the one that has not been used for longest leaves."""
    views[key] = view
    if len(views) > KEPT_KINDS:
        del views[next(iter(views))]


class ScratchPool:
    """Keeps the scratch of one call for the next; each of several concurrent calls has its own."""

    def __init__(self) -> None:
        self._idle: deque[Scratch] = deque(maxlen=1)  # Its operations are atomic.

    def take(self) -> Scratch:
        try:
            return self._idle.pop()
        except IndexError:
            return Scratch()

    def give_back(self, scratch: Scratch) -> None:
        """Called if there was no error: after one, its tables may not be all 0."""
        if scratch.nbytes <= KEPT_BYTES:
            self._idle.append(scratch)


SCRATCH = ScratchPool()


REUSED_BYTES = 4 << 20
"""Gradients of fewer bytes are not worth it: the allocator reuses their memory itself."""


class GradientPool:
    """Keeps the memory of one gradient that its caller has let go of for the next gradient, at most ``KEPT_BYTES``."""

    def __init__(self) -> None:
        # A deque, whose operations are atomic: memory comes back in any thread, also in the midst of ``tensor``.
        self._idle: deque[npt.NDArray[np.float32]] = deque(maxlen=1)

    def tensor(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor with undefined contents. Its memory comes back when no tensor or array that uses it is left."""
        size = prod(shape)
        if not REUSED_BYTES <= 4 * size <= KEPT_BYTES:
            return torch.from_numpy(np.empty(shape, np.float32))
        try:
            memory = self._idle.pop()
        except IndexError:
            memory = np.empty(0, np.float32)
        if not size <= len(memory) <= 2 * size:
            memory = np.empty(size, np.float32)  # By NumPy, since it asks the system for large pages.
        array = memory[:size].reshape(shape)
        # The tensor's storage alone refers to this array: an array that others know might end before its views do.
        weakref.finalize(array, self._idle.append, memory).atexit = False
        return torch.from_numpy(array)


GRADIENTS = GradientPool()
