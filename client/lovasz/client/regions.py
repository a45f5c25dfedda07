"""Regions: memory that can be shared with a server on this host, and that holds the tensors of requests."""

from __future__ import annotations

import mmap
import os
import weakref
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

import numpy.typing as npt

from lovasz import wire
from lovasz.client.memory import Memory, MemoryPool
from lovasz.client.options import IN_SHARED_MEMORY
from lovasz.client.tensors import Array, Outgoing
from lovasz.v1 import loss_pb2 as pb


class Holder(Protocol):
    """What regions are shared over: a session with a server."""

    def release(self, region: Shared) -> None:
        """Stops sharing a region."""


class Shared(ABC):
    """Memory that can be shared with another process by a file descriptor, and that returns to a pool.

    Attributes:
        kind: the way of a request in it, as ``spec.Timing.transport`` tells it.
        descriptor: stands for the memory.
        was_shared: whether a server has had it, or may have.
        nbytes: its size.
        session: the session in which the server has it; None if it has not.
        number: its number in that session.
    """

    kind: ClassVar[str]
    nbytes: int

    def __init__(self, descriptor: int) -> None:
        self._set_descriptor(descriptor)
        self.session: Holder | None = None
        self.number = 0

    def _set_descriptor(self, descriptor: int) -> None:
        self.descriptor, self.was_shared = descriptor, False
        self._close_descriptor = weakref.finalize(self, os.close, descriptor)

    @abstractmethod
    def renew(self) -> None:
        """Makes it shareable once more, with the same contents."""

    def description(self) -> pb.DeviceMemory | None:
        """What the server has to know of it beside the descriptor; None for a memfd."""
        return None

    @abstractmethod
    def write_tensors(self, places: wire.Places, logits: Outgoing, labels: Outgoing) -> None:
        """Copies the tensors of a request to their places, at the latest when :meth:`complete` returns."""

    @abstractmethod
    def complete(self) -> None:
        """Waits until all that was written to it is there."""

    @abstractmethod
    def bytes(self, offset: int, nbytes: int) -> memoryview:
        """A part of it, in this process's host memory."""

    def tensors(self, request: wire.Request) -> tuple[memoryview, memoryview]:
        """Logits and labels of a request that is in it, in this process's host memory."""
        place = request.places
        return self.bytes(place.logits, request.logits.nbytes), self.bytes(place.labels, request.labels.nbytes)

    @abstractmethod
    def take_gradient(self, offset: int, spec: wire.TensorSpec, *, copied: bool) -> Array:
        """The gradient in it. It returns to its pool with the gradient's last view, or at once.

        Args:
            offset: where the gradient is.
            spec: its element type and shape.
            copied: it may be copied out of the memory.
        """

    @abstractmethod
    def give_back(self) -> None:
        """Returns it to its pool."""

    def close(self) -> None:
        """Ends the sharing. The memory is freed once nothing uses it."""
        if self.session is not None:
            self.session.release(self)
        self._close_descriptor()


class Region(Memory, Shared):
    """A block of memory of the host that can be shared with another process."""

    kind = IN_SHARED_MEMORY

    def __init__(self, nbytes: int, pool: MemoryPool[Region] | None = None) -> None:
        """Allocates the region.

        Args:
            nbytes: its size.
            pool: that it returns to.

        Raises:
            OSError: there is no memory left.
        """
        self.nbytes = nbytes
        descriptor, self.map = self._allocated()
        Shared.__init__(self, descriptor)
        self._pool = pool

    def _allocated(self) -> tuple[int, mmap.mmap]:
        import fcntl  # Windows has none.

        descriptor = os.memfd_create("lovasz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # Allocating all pages at once is faster than one by one at the first writes.
            os.posix_fallocate(descriptor, 0, self.nbytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            return descriptor, mmap.mmap(descriptor, self.nbytes)
        except BaseException:
            os.close(descriptor)
            raise

    def renew(self) -> None:
        """Replaces the memory, as a memfd that a server has had cannot be mapped for writing again.

        Raises:
            OSError: there is no memory left.
        """
        if self.was_shared:
            descriptor, memory = self._allocated()
            with memoryview(memory) as new, memoryview(self.map) as old:
                new[:] = old
            self._close_descriptor()
            self.map = memory
            self._set_descriptor(descriptor)

    def write_tensors(self, places: wire.Places, logits: Outgoing, labels: Outgoing) -> None:
        logits.write(self.array(places.logits, logits.source.shape, logits.dtype.numpy))
        labels.write(self.array(places.labels, labels.source.shape, labels.dtype.numpy))

    def complete(self) -> None:
        """Nothing to wait for."""

    def bytes(self, offset: int, nbytes: int) -> memoryview:
        return memoryview(self.map)[offset : offset + nbytes]

    def take_gradient(self, offset: int, spec: wire.TensorSpec, *, copied: bool) -> npt.NDArray[Any]:
        shape, dtype = spec.shape, spec.dtype.numpy
        if not copied:
            assert self._pool is not None
            return self._pool.lend(self, offset, shape, dtype)
        # Costs less than a region that is not there for the next call.
        grad: npt.NDArray[Any] = self.array(offset, shape, dtype).copy()
        self.give_back()
        return grad

    def give_back(self) -> None:
        assert self._pool is not None
        self._pool.give(self)

    def close(self) -> None:
        Shared.close(self)
