"""Memory that is shared with a server on this host: a session with the server, and regions that hold tensors.

The contract is in ``loss.proto`` (SharedTensors): a region is a memfd, passed over a Unix socket next to gRPC's.
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import socket
import threading
import weakref
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy.typing as npt

from lovasz import wire
from lovasz.client.errors import LossError, ServerUnavailableError
from lovasz.client.memory import Memory, MemoryPool
from lovasz.client.tensors import Array, Outgoing
from lovasz.v1 import loss_pb2 as pb

_MAX_PACKET_BYTES = 4096
_ALIGNMENT = 64


class Shared(ABC):
    """Memory that can be shared with another process by a file descriptor.

    Attributes:
        descriptor: stands for the memory.
        session: the session in which the server has it; None if it has not.
        number: its number in that session.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._close_descriptor = weakref.finalize(self, os.close, descriptor)
        self.session: Session | None = None
        self.number = 0

    def description(self) -> pb.DeviceMemory | None:
        """What the server has to know of it beside the descriptor; None for a memfd."""
        return None

    @abstractmethod
    def write(self, offset: int, tensor: Outgoing) -> memoryview:
        """Copies a tensor to its place, at the latest when :meth:`complete` returns.

        Returns:
            Its bytes there; empty if they are not in the host's memory.
        """

    @abstractmethod
    def complete(self) -> None:
        """Waits until all that was written to it is there."""

    @abstractmethod
    def bytes(self, offset: int, nbytes: int) -> memoryview:
        """A part of it, in this process's host memory."""

    @abstractmethod
    def lend(self, offset: int, spec: wire.TensorSpec) -> Array:
        """A part of it as a tensor; it returns to its pool when the tensor's last view is gone."""

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
        self._pool = pool

    def complete(self) -> None:
        """Nothing to wait for."""

    def bytes(self, offset: int, nbytes: int) -> memoryview:
        return memoryview(self.map)[offset : offset + nbytes]

    def lend(self, offset: int, spec: wire.TensorSpec) -> npt.NDArray[Any]:
        assert self._pool is not None
        return self._pool.lend(self, offset, spec.shape, spec.dtype.numpy)

    def give_back(self) -> None:
        assert self._pool is not None
        self._pool.give(self)

    def close(self) -> None:
        Shared.close(self)


class Session:
    """A connection that regions are shared over. The server unmaps them when it ends.

    Attributes:
        name: names the session in ``SharedTensors``.
        devices: the UUIDs of the GPUs whose memory the server takes.
    """

    _numbers = itertools.count(1)

    def __init__(self, path: str, timeout: float) -> None:
        """Connects.

        Args:
            path: of the socket on which the server takes regions.
            timeout: seconds for each packet.

        Raises:
            ServerUnavailableError: no server takes shared memory there.
        """
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(path)
            hello = self._reply()
            self.name, self.devices = hello.session, frozenset(hello.devices)
        except OSError as error:
            self._socket.close()
            raise ServerUnavailableError(
                f"{path}: no shared memory: {error.strerror or error} (is the server up, and started with "
                "--shared-memory?)"
            ) from None
        except BaseException:
            self._socket.close()
            raise

    def share(self, region: Shared) -> None:
        """Shares a region, unless the server already has it.

        Raises:
            LossError: the server refuses the region, or is gone.
        """
        if region.session is self:
            return
        number = next(self._numbers)
        try:
            with self._lock:
                packet = pb.SharedMemoryRequest(region=number, device_memory=region.description()).SerializeToString()
                socket.send_fds(self._socket, [packet], [region.descriptor])
                self._reply()
        except OSError as error:
            self.close()  # A late reply would be taken for the reply to the next packet.
            raise ServerUnavailableError(f"shared memory: {error.strerror or error}") from None
        region.session, region.number = self, number

    def release(self, region: Shared) -> None:
        """Stops sharing a region."""
        region.session = None
        try:
            with self._lock:
                packet = pb.SharedMemoryRequest(region=region.number, release=True)
                self._socket.send(packet.SerializeToString())
                self._reply()
        except (OSError, LossError):
            self.close()  # Ends the sharing of all regions.

    def close(self) -> None:
        """Ends the session."""
        self._socket.close()

    def _reply(self) -> pb.SharedMemoryReply:
        packet = self._socket.recv(_MAX_PACKET_BYTES)
        if not packet:
            raise ConnectionResetError("the server ended the session")
        reply = pb.SharedMemoryReply.FromString(packet)
        if reply.error:
            raise LossError(f"shared memory: {reply.error}")
        return reply


class Places(NamedTuple):
    """Where a request's tensors are in its region, as offsets in bytes, and the size that the region needs."""

    logits: int
    labels: int
    grad: int
    nbytes: int


def places(request: wire.Request) -> Places:
    """Lays out a request's region: logits, labels and gradient, each aligned."""
    offset, offsets = 0, []
    for size in (request.logits.nbytes, request.labels.nbytes, request.grad_bytes):
        offsets.append(offset)
        offset = -(-(offset + size) // _ALIGNMENT) * _ALIGNMENT
    logits, labels, grad = offsets
    return Places(logits, labels, grad, nbytes=offset)


class SharedMemory:
    """The regions of one client, and its session with the server. A session that has ended is replaced."""

    def __init__(self, path: str) -> None:
        """Connects at the first region that is shared.

        Args:
            path: of the socket on which the server takes regions.
        """
        self._path = path
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._closed = False
        self.regions: MemoryPool[Region] = MemoryPool(lambda nbytes: Region(nbytes, self.regions))

    def devices(self, timeout: float) -> frozenset[bytes]:
        """The UUIDs of the GPUs whose memory the server takes.

        Raises:
            ServerUnavailableError: no server takes shared memory there, or this was closed.
        """
        with self._lock:
            if self._closed:
                raise ServerUnavailableError(f"{self._path}: closed")
            if self._session is None:
                self._session = Session(self._path, timeout)
            return self._session.devices

    def share(self, region: Shared, timeout: float) -> bytes:
        """Shares the region, unless the server already has it; returns the session's name.

        Raises:
            ServerUnavailableError: no server takes shared memory there, or this was closed.
            LossError: the server refuses the region.
        """
        with self._lock:
            if self._closed:
                raise ServerUnavailableError(f"{self._path}: closed")
            if self._session is not None:
                try:
                    self._session.share(region)
                    return self._session.name
                except ServerUnavailableError:  # That server is gone; another one may have started.
                    self._end(self._session)
            session = Session(self._path, timeout)
            try:
                session.share(region)
            except LossError:
                session.close()
                raise
            self._session = session
            return session.name

    def forget(self) -> None:
        """Drops the session, which the server no longer knows. The next call begins another."""
        with self._lock:
            if self._session is not None:
                self._end(self._session)

    def close(self) -> None:
        """Ends the session and frees the idle regions."""
        self._closed = True
        self.forget()
        self.regions.close()

    def _end(self, session: Session) -> None:
        session.close()
        if session is self._session:
            self._session = None
