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
from typing import NamedTuple

from lovasz import wire
from lovasz.client.errors import LossError, ServerUnavailableError
from lovasz.client.memory import Memory, MemoryPool
from lovasz.client.memory_socket import MemorySocket, check_same_server
from lovasz.v1 import loss_pb2 as pb

_log = logging.getLogger(__name__)

_ALIGNMENT = 64
_LEAST_REGION_BYTES = 64 << 10
"""So that small requests can use each other's regions."""
_MAX_HEADER_BYTES = wire.MAX_PACKET_BYTES - 4096
"""Of a call on the socket: the rest of the packet is for its metadata."""
_RELEASE_SECONDS = 1.0
_PAUSE_SECONDS = 30.0
"""How long a client whose server has refused its memory does without."""


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
        takes_calls: whether the server takes calls on it.
    """

    _numbers = itertools.count(1)

    def __init__(self, path: str, timeout: float) -> None:
        """Connects.

        Args:
            path: of the socket on which the server takes regions.
            timeout: seconds for each packet about a region.

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
        self.name, self.takes_calls = self.socket.hello.session, self.socket.hello.takes_calls

    def share(self, region: Region) -> None:
        """Shares a region, unless the server already has it.

        Raises:
            LossError: the server refuses the region, or is gone.
        """
        if region.session is self:
            return
        number = next(self._numbers)
        try:
            self.socket.ask(pb.SharedMemoryRequest(region=number), [region.descriptor], self._timeout)
        except OSError as error:
            raise ServerUnavailableError(f"shared memory: {error.strerror or error}") from None
        region.session, region.number = self, number

    def takes(self, request: wire.Request, header: pb.RequestHeader) -> bool:
        """Whether a call can be made on the socket: the server takes it, and header and answer fit into a packet."""
        fits = header.ByteSize() < _MAX_HEADER_BYTES and request.max_answer_bytes <= wire.MAX_PACKET_BYTES
        return self.takes_calls and fits

    def release(self, region: Region) -> None:
        """Stops sharing a region."""
        region.session = None
        try:
            self.socket.ask(pb.SharedMemoryRequest(region=region.number, release=True), (), _RELEASE_SECONDS)
        except (OSError, LossError):
            self.close()  # Ends the sharing of all regions.

    def close(self) -> None:
        """Ends the session."""
        self.socket.close()


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
        self.regions: MemoryPool[Region] = MemoryPool(Region)

    @property
    def is_offered(self) -> bool:
        """Whether the server seems to take shared memory; False for a while after it refused."""
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

    def share(self, region: Region, timeout: float) -> Session:
        """Shares the region, unless the server already has it; returns the session.

        Raises:
            ServerUnavailableError: no server takes shared memory there, or this was closed.
            LossError: the server refuses the region.
        """
        session = self._session
        if session is not None and region.session is session and not session.socket.is_closed:
            return session
        with self._lock:
            if self._closed:
                raise ServerUnavailableError(f"{self._path}: closed")
            if self._session is not None:
                try:
                    self._session.share(region)
                    return self._session
                except ServerUnavailableError:  # That server is gone; another one may have started.
                    self._end(self._session)
            session = self._new_session(timeout)
            try:
                session.share(region)
            except LossError:
                session.close()
                raise
            if self._closed:
                session.close()
            self._session = session
            return session

    def session(self, timeout: float) -> Session:
        """The session; begins one if there is none.

        Raises:
            ServerUnavailableError: no server takes shared memory there.
            LossError: it refuses the session.
        """
        with self._lock:
            if self._session is None or self._session.socket.is_closed:
                self._session = self._new_session(timeout)
            return self._session

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

    def forget(self, session: Session) -> None:
        """Drops a session, which the server no longer knows. The next call begins another."""
        with self._lock:
            self._end(session)

    def close(self) -> None:
        """Ends the session and frees the idle regions."""
        self._closed = True
        session = self._session
        if session is not None:
            session.close()  # Without the lock: another thread may hold it while it waits for the server.
        self.regions.close()

    def _end(self, session: Session) -> None:
        session.close()
        if session is self._session:
            self._session = None
