"""Memory that is shared with a server on this host: a session with the server, and regions that hold tensors.

The contract is in ``loss.proto`` (SharedTensors): a region is a memfd, passed over a Unix socket next to gRPC's. On it
calls can be made, too.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import math
import mmap
import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import grpc
import numpy.typing as npt

from lovasz import wire
from lovasz.client.errors import LossError, ServerUnavailableError
from lovasz.client.memory import Memory, MemoryPool
from lovasz.client.memory_socket import MemorySocket, SocketError, check_same_server
from lovasz.client.options import IN_SHARED_MEMORY
from lovasz.client.tensors import Array, Outgoing
from lovasz.v1 import loss_pb2 as pb

_log = logging.getLogger(__name__)

_LEAST_REGION_BYTES = 64 << 10
"""So that small requests can use each other's regions."""
_MAX_HEADER_BYTES = wire.MAX_PACKET_BYTES - 4096
"""Of a call on the socket: the rest of the packet is for its metadata."""
_RELEASE_SECONDS = 0.1
"""How long a client whose server does not read tries to tell it that a region is released."""
_PAUSE_SECONDS = 30.0
"""How long a client whose server has refused its memory does without."""


class Shared(ABC):
    """Memory that can be shared with another process by a file descriptor, and that returns to a pool.

    Attributes:
        kind: the way of a request in it, as ``spec.Timing.transport`` tells it.
        descriptor: stands for the memory.
        session: the session in which the server has it; None if it has not.
        number: its number in that session.
    """

    kind: ClassVar[str]

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._close_descriptor = weakref.finalize(self, os.close, descriptor)
        self.session: Session | None = None
        self.number = 0

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
        descriptor = os.memfd_create("lovasz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # Allocating all pages at once is faster than one by one at the first writes.
            os.posix_fallocate(descriptor, 0, nbytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self.map = mmap.mmap(descriptor, nbytes)
        except BaseException:
            os.close(descriptor)
            raise
        Shared.__init__(self, descriptor)
        self.nbytes = nbytes
        self._pool = pool

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


class Session:
    """A connection that regions are shared over. The server unmaps them when it ends.

    Attributes:
        name: names the session in ``SharedTensors``.
        takes_calls: whether the server takes calls on it.
        devices: the UUIDs of the GPUs whose memory the server takes.
    """

    _numbers = itertools.count(1)

    def __init__(self, path: str, timeout: float) -> None:
        """Connects.

        Args:
            path: of the socket on which the server takes regions.
            timeout: seconds.

        Raises:
            ServerUnavailableError: no server takes shared memory there, or somebody else than the server.
            LossError: the server refuses it.
        """
        self._timeout = timeout
        try:
            self.socket = MemorySocket(path, timeout)
        except OSError as error:
            raise ServerUnavailableError(
                f"{path}: no shared memory: {error.strerror or error} (is the server up, and started with "
                "--shared-memory?)"
            ) from None
        hello = self.socket.hello
        self.name, self.takes_calls, self.devices = hello.session, hello.takes_calls, frozenset(hello.devices)

    def share(self, region: Shared, timeout: float | None = None) -> None:
        """Shares a region, unless the server already has it.

        Args:
            timeout: seconds; None: as many as to connect.

        Raises:
            LossError: the server refuses the region, or is gone.
            SocketError: it has not answered in time, and may still take the region: then :meth:`release` tells it.
        """
        if region.session is self and not self.socket.is_closed:
            return
        region.session, region.number = self, next(self._numbers)
        try:
            request = pb.SharedMemoryRequest(region=region.number, device_memory=region.description())
            self.socket.ask(request, [region.descriptor], self._timeout if timeout is None else timeout)
        except TimeoutError:
            raise SocketError(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded") from None
        except (OSError, LossError) as error:
            region.session = None
            if isinstance(error, LossError):
                raise
            raise ServerUnavailableError(f"shared memory: {error.strerror or error}") from None

    def takes(self, request: wire.Request, header: pb.RequestHeader) -> bool:
        """Whether a call can be made on the socket: the server takes it, and header and answer fit into a packet."""
        fits = header.ByteSize() < _MAX_HEADER_BYTES and request.max_answer_bytes <= wire.MAX_PACKET_BYTES
        return self.takes_calls and fits

    def release(self, region: Shared) -> None:
        """Stops sharing a region; the server may have it for a moment longer. Hardly waits if the server is stalled."""
        region.session = None
        try:
            self.socket.tell(pb.SharedMemoryRequest(region=region.number, release=True), _RELEASE_SECONDS)
        except OSError:
            self.close()  # Ends the sharing of all regions.

    def close(self) -> None:
        """Ends the session."""
        self.socket.close()


class SharedMemory:
    """The regions of one client, and its session with the server. A session that has ended is replaced.

    Attributes:
        takes_calls: whether the server took calls on the socket when a session last began; None before the first.
    """

    def __init__(self, path: str) -> None:
        """Connects at the first region that is shared.

        Args:
            path: of the server's gRPC socket.
        """
        self._server_path, self._path = path, path + wire.MEMORY_SUFFIX
        self._closed = False
        self._paused_until = -math.inf
        self._has_said_why = False
        self.takes_calls: bool | None = None
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._session: Session | None = None
        self.regions: MemoryPool[Region] = MemoryPool(lambda nbytes: Region(nbytes, self.regions))

    @property
    def is_offered(self) -> bool:
        """Whether the server seems to take shared memory; False for a while after it refused."""
        session = self._session
        if session is not None and not session.socket.is_closed:
            return True
        return time.monotonic() >= self._paused_until and os.path.exists(self._path)

    def pause(self, why: Exception) -> None:
        """Does without shared memory for a while; says why, once."""
        self._paused_until = time.monotonic() + _PAUSE_SECONDS
        if not self._has_said_why and not self._closed:
            self._has_said_why = True
            _log.warning("tensors go over gRPC, not through shared memory: %s", why)

    def take(self, nbytes: int) -> Region:
        """A region of at least ``nbytes`` bytes. After a fork, never one that is shared with the parent."""
        if self._process != os.getpid():
            inherited = self._session
            self._begin()
            if inherited is not None:
                inherited.socket.drop()
        return self.regions.take(max(nbytes, _LEAST_REGION_BYTES))

    def moved(self, source: Shared, request: wire.Request) -> Region:
        """A region of the host's memory with the tensors that are in another one."""
        region = self.take(request.places.nbytes)
        for into, tensor in zip(region.tensors(request), source.tensors(request), strict=True):
            into[:] = tensor
        return region

    def share(self, region: Shared, timeout: float) -> Session:
        """Shares the region, unless the server already has it; returns the session.

        Raises:
            ServerUnavailableError: no server takes shared memory there, or this was closed.
            LossError: the server refuses the region.
            SocketError: there was no answer in time.
        """
        session = self._session
        if session is not None and region.session is session and not session.socket.is_closed:
            return session
        with self._locked(timeout) as left:
            session = self._session
            if session is not None:
                try:
                    session.share(region, left())
                    return session
                except ServerUnavailableError:  # That server is gone; another one may have started.
                    session.close()
            session = self._new_session(left())
            try:
                session.share(region, left())
            except (LossError, SocketError):
                session.close()
                raise
            if self._closed:
                session.close()
            self._session = session
            return session

    def session(self, timeout: float) -> Session:
        """The session; begins one if there is none.

        Raises:
            ServerUnavailableError: no server takes shared memory there, or this was closed.
            LossError: it refuses the session.
            SocketError: other threads waited for the server all that time.
        """
        with self._locked(timeout) as left:
            if self._session is None or self._session.socket.is_closed:
                self._session = self._new_session(left())
            return self._session

    @contextmanager
    def _locked(self, timeout: float) -> Iterator[Callable[[], float]]:
        """Holds the lock; gives the seconds that are left."""
        deadline = time.monotonic() + timeout
        if not self._lock.acquire(timeout=max(0.0, timeout)):
            raise SocketError(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
        try:
            if self._closed:
                raise ServerUnavailableError(f"{self._path}: closed")
            yield lambda: deadline - time.monotonic()
        finally:
            self._lock.release()

    def _new_session(self, timeout: float) -> Session:
        session = Session(self._path, timeout)
        try:
            check_same_server(session.socket.peer, self._server_path, timeout)
        except OSError as error:
            session.close()
            raise ServerUnavailableError(f"{self._server_path}: {error.strerror or error}") from None
        except BaseException:
            session.close()
            raise
        self.takes_calls = session.takes_calls
        return session

    def close(self) -> None:
        """Ends the session and frees the idle regions."""
        self._closed = True
        session = self._session
        if session is not None:
            session.close()  # Without the lock: another thread may hold it while it waits for the server.
        self.regions.close()
