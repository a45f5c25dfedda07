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
from typing import NamedTuple

from lovasz import wire
from lovasz.client.errors import LossError, ServerUnavailableError
from lovasz.client.memory import Memory, MemoryPool
from lovasz.v1 import loss_pb2 as pb

_MAX_PACKET_BYTES = 4096
_ALIGNMENT = 64


class Region(Memory):
    """A block of memory that can be shared with another process.

    Attributes:
        descriptor: its memfd.
        session: the session in which the server has it; None if it has not.
        number: its number in that session.
    """

    def __init__(self, nbytes: int) -> None:
        """Allocates the region.

        Raises:
            OSError: there is no memory left.
        """
        self.descriptor = os.memfd_create("lovasz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # Allocating all pages at once is faster than one by one at the first writes.
            os.posix_fallocate(self.descriptor, 0, nbytes)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self.map = mmap.mmap(self.descriptor, nbytes)
        except BaseException:
            os.close(self.descriptor)
            raise
        self._close_descriptor = weakref.finalize(self, os.close, self.descriptor)
        self.session: Session | None = None
        self.number = 0

    def close(self) -> None:
        if self.session is not None:
            self.session.release(self)
        self._close_descriptor()


class Session:
    """A connection that regions are shared over. The server unmaps them when it ends.

    Attributes:
        name: names the session in ``SharedTensors``.
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
            self.name = self._reply().session
        except OSError as error:
            self._socket.close()
            raise ServerUnavailableError(
                f"{path}: no shared memory: {error.strerror or error} (is the server up, and started with "
                "--shared-memory?)"
            ) from None
        except BaseException:
            self._socket.close()
            raise

    def share(self, region: Region) -> None:
        """Shares a region, unless the server already has it.

        Raises:
            LossError: the server refuses the region, or is gone.
        """
        if region.session is self:
            return
        number = next(self._numbers)
        try:
            with self._lock:
                packet = pb.SharedMemoryRequest(region=number).SerializeToString()
                socket.send_fds(self._socket, [packet], [region.descriptor])
                self._reply()
        except OSError as error:
            self.close()  # A late reply would be taken for the reply to the next packet.
            raise ServerUnavailableError(f"shared memory: {error.strerror or error}") from None
        region.session, region.number = self, number

    def release(self, region: Region) -> None:
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
        self.regions: MemoryPool[Region] = MemoryPool(Region)

    def share(self, region: Region, timeout: float) -> bytes:
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
