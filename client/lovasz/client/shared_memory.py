"""Memory that is shared with a server on this host: a session with the server, over which regions are shared.

The contract is in ``loss.proto`` (SharedTensors): a region is a memfd, passed over a Unix socket next to gRPC's. On it
calls can be made, too.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from lovasz import wire
from lovasz.client.connection import Connection
from lovasz.client.errors import LossError, ServerOverloadedError, ServerUnavailableError
from lovasz.client.memory import MemoryPool
from lovasz.client.memory_socket import MemorySocket, SocketError, check_same_server
from lovasz.client.regions import Region, Shared
from lovasz.client.turn import Turn
from lovasz.v1 import loss_pb2 as pb

_log = logging.getLogger(__name__)

_LEAST_REGION_BYTES = 64 << 10
"""So that small requests can use each other's regions."""
_MAX_HEADER_BYTES = wire.MAX_PACKET_BYTES - 4096
"""Of a call on the socket: the rest of the packet is for its metadata."""
_RELEASE_SECONDS = 0.1
"""How long a client whose server does not read tries to tell it that a region is released."""
_SETTLE_SECONDS = 1.0
"""How long it waits for memory that was released to be free."""
_LOOK_SECONDS = 0.01
"""How often it is looked whether a region is free again."""
_PAUSE_SECONDS = 30.0
"""How long a client whose server has refused its memory does without."""


class NoRegionLeftError(ServerOverloadedError):
    """As many regions are in use as the server takes: by calls in flight, and by gradients that are kept."""


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
        self._shared = set[int]()
        """The numbers of the regions that the server has. No lock: the garbage collector may release a region."""

    @property
    def is_full(self) -> bool:
        """Whether the server takes no more regions."""
        return len(self._shared) >= wire.MAX_REGIONS

    @property
    def is_nearly_full(self) -> bool:
        """Whether gradients had better be copied than keep their regions."""
        return 4 * len(self._shared) >= 3 * wire.MAX_REGIONS

    def share(self, region: Shared, timeout: float | None = None) -> None:
        """Shares a region, unless the server already has it.

        Args:
            timeout: seconds; None: as many as to connect.

        Raises:
            NoRegionLeftError: the server takes no more of them.
            LossError: the server refuses the region, or is gone.
            SocketError: it has not answered in time, and may still take the region: then :meth:`release` tells it.
        """
        if region.session is self and not self.socket.is_closed:
            return
        if self.is_full:
            raise NoRegionLeftError(
                f"shared memory: {wire.MAX_REGIONS} regions are in use, the maximum, by calls in flight and gradients "
                'that are kept; have fewer of them, or use transport="auto", which sends the others over gRPC'
            )
        try:
            region.renew()
        except OSError as error:
            raise LossError(
                f"shared memory: no other region of {region.nbytes} bytes: {error.strerror or error}"
            ) from None
        region.session, region.number, region.was_shared = self, next(self._numbers), True
        self._shared.add(region.number)
        try:
            request = pb.SharedMemoryRequest(region=region.number, device_memory=region.description())
            self.socket.ask(request, [region.descriptor], self._timeout if timeout is None else timeout)
        except TimeoutError:
            raise SocketError.late() from None
        except (OSError, LossError) as error:
            region.session = None
            self._shared.discard(region.number)
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
        self._shared.discard(region.number)
        try:
            self.socket.tell(pb.SharedMemoryRequest(region=region.number, release=True), _RELEASE_SECONDS)
        except OSError:
            self.close()  # Ends the sharing of all regions.

    def settle(self) -> None:
        """Waits until the server has taken back what was released, unless that takes long."""
        with suppress(OSError, LossError):  # Packets are answered in their order; no region has the number 0.
            self.socket.ask(pb.SharedMemoryRequest(region=0, release=True), (), _SETTLE_SECONDS)

    def close(self) -> None:
        """Ends the session."""
        self.socket.close()


class SharedMemory:
    """The regions of one client, and its session with the server. A session that has ended is replaced.

    Attributes:
        takes_calls: whether the server took calls on the socket when a session last began; None before the first.
    """

    def __init__(self, path: str, connection: Connection, *, waits: bool = False) -> None:
        """Connects at the first region that is shared.

        Args:
            path: of the server's gRPC socket.
            connection: to the server there.
            waits: there is no other way: a call for which the server takes no more regions waits until it does.
        """
        self._connection, self._waits = connection, waits
        self._server_path, self._path = path, path + wire.MEMORY_SUFFIX
        self._closed = False
        self._paused_until = -math.inf
        self._has_said_why = False
        self.takes_calls: bool | None = None
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._turn = Turn()
        self._session: Session | None = None
        self.regions: MemoryPool[Region] = MemoryPool(lambda nbytes: Region(nbytes, self.regions))

    @property
    def is_offered(self) -> bool:
        """Whether the server seems to take shared memory; False for a while after it refused."""
        session = self._session
        if session is not None and not session.socket.is_closed:
            return True
        return time.monotonic() >= self._paused_until and os.path.exists(self._path)

    @property
    def is_nearly_full(self) -> bool:
        """See :attr:`Session.is_nearly_full`."""
        session = self._session
        return session is not None and session.is_nearly_full

    def pause(self, why: Exception) -> None:
        """Does without shared memory for a while; says why, once."""
        self._paused_until = time.monotonic() + _PAUSE_SECONDS
        if not self._has_said_why and not self._closed:
            self._has_said_why = True
            _log.warning("tensors go over gRPC, not through shared memory: %s", why)

    def take(self, nbytes: int) -> Region | None:
        """A region of at least ``nbytes`` bytes. After a fork, never one that is shared with the parent.

        Returns:
            None if this process can have no such memory, and there is another way; says so, as :meth:`pause` does.

        Raises:
            LossError: this process can have no such memory.
        """
        try:
            return self._taken(nbytes)
        except LossError as error:
            if self._waits:
                raise
            self.pause(error)
            return None

    def _taken(self, nbytes: int) -> Region:
        self._leave_to_parent()
        try:
            return self.regions.take(max(nbytes, _LEAST_REGION_BYTES))
        except OSError as error:  # Memory, descriptors, or the size of files.
            raise LossError(f"shared memory: no region of {nbytes} bytes: {error.strerror or error}") from None

    def _leave_to_parent(self) -> None:
        """Begins anew after a fork: session and regions are the parent's."""
        if self._process != os.getpid():
            inherited = self._session
            self._begin()
            if inherited is not None:
                inherited.socket.drop()

    def moved(self, source: Shared, request: wire.Request) -> Region:
        """A region of the host's memory with the tensors that are in another one.

        Raises:
            LossError: this process can have no such memory.
        """
        region = self._taken(request.places.nbytes)
        for into, tensor in zip(region.tensors(request), source.tensors(request), strict=True):
            into[:] = tensor
        return region

    def share(self, region: Shared, timeout: float) -> Session:
        """Shares the region, unless the server already has it; returns the session.

        Raises:
            ServerUnavailableError: the server takes no shared memory there.
            NoRegionLeftError: the server takes no more regions.
            LossError: the server refuses the region.
            grpc.RpcError: no server answers, or not in time.
            ValueError: gRPC's, if the client was closed.
        """
        session = self._session
        if session is not None and region.session is session and not session.socket.is_closed:
            return session
        deadline = time.monotonic() + timeout
        while True:
            try:
                return self._twice(partial(self._share, region), deadline - time.monotonic())
            except NoRegionLeftError:
                if not self._waits or time.monotonic() + _LOOK_SECONDS >= deadline:
                    raise
            time.sleep(_LOOK_SECONDS)

    def session(self, timeout: float) -> Session:
        """The session; begins one if there is none.

        Raises:
            LossError, grpc.RpcError, ValueError: as for :meth:`share`.
        """
        return self._twice(self._begun, timeout)

    def settle(self) -> None:
        """Waits until the server has taken back what was released, unless that takes long."""
        session = self._session
        if session is not None:
            session.settle()

    def _twice(self, begin: Callable[[Callable[[], float]], Session], timeout: float) -> Session:
        """Looks once more for shared memory that was not there, if a server answers: it may have started meanwhile.

        It listens for shared memory before its gRPC answers.
        """
        deadline = time.monotonic() + timeout
        try:
            return self._alone(begin, timeout)
        except ServerUnavailableError:
            self._connection.info(deadline - time.monotonic())
        try:
            return self._alone(begin, deadline - time.monotonic())
        except ServerUnavailableError:
            if time.monotonic() >= deadline:
                raise SocketError.late() from None
            raise

    def _share(self, region: Shared, left: Callable[[], float]) -> Session:
        session = self._session
        if session is not None:
            if session.is_full:
                self.regions.clear()
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
        self._keep(session)
        return session

    def _begun(self, left: Callable[[], float]) -> Session:
        session = self._session
        if session is None or session.socket.is_closed:
            session = self._new_session(left())
            self._keep(session)
        return session

    def _keep(self, session: Session) -> None:
        self._session = session
        if self._closed:  # Only now: whoever closes this ends the session that is kept.
            session.close()

    def _alone(self, begin: Callable[[Callable[[], float]], Session], timeout: float) -> Session:
        """Calls ``begin`` with the seconds that are left, as a function, in one thread at a time."""
        deadline = time.monotonic() + timeout

        def work() -> Session:
            if self._closed:
                raise ServerUnavailableError(f"{self._path}: closed")
            return begin(lambda: deadline - time.monotonic())

        done = self._turn.call(work, timeout)
        if done is None:
            raise SocketError.late()
        return done[0]

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
        self._leave_to_parent()
        session = self._session
        if session is not None:
            session.close()  # Without the lock: another thread may hold it while it waits for the server.
        self.regions.close()
