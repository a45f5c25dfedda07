"""The Unix socket on which processes on this host share memory with the server, and ask for losses of tensors in it.

A session is a connection. When it ends, so do its calls, and its regions are released, except those that a request
still uses: these live until that request is done. If a process is killed, the kernel closes its connection.
"""

from __future__ import annotations

import contextlib
import logging
import math
import resource
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from lovasz import wire
from lovasz.server.errors import SessionLostError
from lovasz.server.memory.shared_devices import SharedDevices
from lovasz.server.transport.device_region import DeviceRegion
from lovasz.server.transport.regions import Closer, Region
from lovasz.server.transport.socket_calls import LAST_ANSWERS_SECONDS, SessionCalls, SocketThreads
from lovasz.server.transport.socket_file import Place, SocketFile
from lovasz.server.transport.tensor_bytes import TensorBytes
from lovasz.spec import InvalidInput
from lovasz.v1 import loss_pb2 as pb

_log = logging.getLogger(__name__)

MAX_SESSIONS = 256
MAX_SESSIONS_OF_USER = 192
"""Processes of one user, so that others find a place."""
MAX_REGIONS = 64
"""In one session."""
FIRST_REGION_SECONDS = 10.0
"""A process that has shared nothing for this long since it connected is disconnected."""
_DESCRIPTORS_SHARE = 8
"""All regions together may take a quarter of the file descriptors that the process may have: each takes two."""

_SESSION_BYTES = 16
_UNREAD_BYTES = 1 << 20
"""Answers that a caller may leave unread, if the system's limit (net.core.wmem_max) is not lower."""
_BACKLOG = 64
_TRUNCATED = int(socket.MSG_TRUNC)
_LOOK_SECONDS = 0.005
_CHECK_SECONDS = 1.0
"""How often the thread looks whether the socket's file is still there, and who is silent."""


@dataclass
class _Session:
    """A process that is connected, since when (``time.monotonic``), and whether it has ever shared a region.

    Attributes:
        calls: its calls in flight; None if the socket takes none.
    """

    connection: socket.socket
    name: bytes
    user: int
    since: float = field(default_factory=time.monotonic)
    has_shared: bool = False
    regions: dict[int, Region | DeviceRegion] = field(default_factory=dict)
    calls: SessionCalls | None = None
    _sending: threading.Lock = field(default_factory=threading.Lock)

    def send(self, reply: pb.SharedMemoryReply) -> None:
        """Sends a packet. If the caller is gone, or reads so slowly that the socket is full, the session ends."""
        packet = reply.SerializeToString()
        with self._sending:
            try:
                self.connection.send(packet)
            except OSError:
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)  # So that the thread sees its end.

    def reply(self, error: str = "", devices: Sequence[bytes] = ()) -> None:
        """Answers a packet about a region, or greets."""
        takes_calls = self.calls is not None
        self.send(pb.SharedMemoryReply(session=self.name, error=error, takes_calls=takes_calls, devices=devices))

    def close(self) -> None:
        """Closes the connection; other threads may be about to send."""
        with self._sending:
            self.connection.close()


class SharedMemory:
    """Serves one socket, in a thread of its own, and finds the tensors of requests.

    Attributes:
        path: the path of the socket. :meth:`start` creates it, and :meth:`stop` removes it.
    """

    def __init__(self, path: str, max_region_bytes: int, max_bytes: int, devices: SharedDevices | None = None) -> None:
        """Nothing listens yet.

        Args:
            max_region_bytes: the largest region.
            max_bytes: the most that all regions may have together.
            devices: the GPUs whose memory is taken, too; None: none.
        """
        self.path = path
        self._devices = devices
        self._max_region_bytes, self._max_bytes = max_region_bytes, max_bytes
        self._closer = Closer()
        self._lock = threading.Lock()
        self._sessions: dict[bytes, _Session] = {}
        self._call_threads: SocketThreads | None = None
        self._due = math.inf
        """When a call's deadline passes, or before (``time.monotonic``)."""
        self._max_all_regions = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _DESCRIPTORS_SHARE
        self._thread = threading.Thread(target=self._serve, name="shared-memory", daemon=True)

    @property
    def sessions(self) -> int:
        """Processes that are connected."""
        return len(self._sessions)

    @property
    def nbytes(self) -> int:
        """Bytes of all regions that are shared."""
        return sum(region.nbytes for region in self._regions())

    @property
    def device_nbytes(self) -> int:
        """Those of them that are device memory."""
        return sum(region.nbytes for region in self._regions() if isinstance(region, DeviceRegion))

    def _regions(self) -> list[Region | DeviceRegion]:
        with self._lock:
            return [region for session in self._sessions.values() for region in session.regions.values()]

    def offer(self, threads: SocketThreads) -> None:
        """Takes calls on the socket, too; comes before :meth:`start`."""
        self._call_threads = threads

    def start(self) -> None:
        """Listens on the socket.

        Raises:
            OSError: the socket cannot be created.
        """
        self._open()
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._listening = False
        self._listen(True)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread.start()

    def stop(self) -> None:
        """Ends all sessions and removes the socket. Calls that are about to be answered have a moment left."""
        if not self._thread.is_alive():
            return
        until = time.monotonic() + LAST_ANSWERS_SECONDS
        while time.monotonic() < until and any(session.calls for session in list(self._sessions.values())):
            time.sleep(_LOOK_SECONDS)
        self._waker.close()
        self._thread.join()
        self._selector.close()
        for session in list(self._sessions.values()):
            self._end(session)
        self._file.remove()
        self._listener.close()
        self._wake.close()

    def is_on_device(self, request: wire.Request) -> bool:
        """Whether the tensors of a request are in device memory; False if there is no such region."""
        return isinstance(self._found(request)[1], DeviceRegion)

    def tensors(self, request: wire.Request) -> TensorBytes:
        """Where the tensors of a request are.

        Raises:
            SessionLostError: there is no such session; its caller can begin another.
            InvalidInput: there is no such region, or a tensor is not inside it.
        """
        session, region = self._found(request)
        if session is None:
            raise SessionLostError("the session of the shared memory has ended, or belongs to another server")
        return TensorBytes.of(request, region)

    def _found(self, request: wire.Request) -> tuple[_Session | None, Region | DeviceRegion | None]:
        shared = request.shared
        assert shared is not None
        with self._lock:
            session = self._sessions.get(shared.session)
            return session, None if session is None else session.regions.get(shared.region)

    def _open(self) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._file = SocketFile(self.path, listener.bind)
            listener.listen(_BACKLOG)
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
        self._listener = listener

    def _check_file(self) -> None:
        """Makes the socket's file again if it was removed. The transport's gRPC socket says what is wrong otherwise."""
        if self._file.look() is not Place.EMPTY:
            return
        old, old_file = self._listener, self._file
        try:
            self._open()
        except OSError:  # Tried again the next time.
            return
        listening = self._listening
        if listening:
            self._selector.unregister(old)
            self._selector.register(self._listener, selectors.EVENT_READ)
        old_file.remove()
        old.close()
        _log.warning("a socket's file was removed; created it again", extra={"path": self.path})

    def _serve(self) -> None:
        checked = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= self._due:
                self._expire(now)
            if now >= checked + _CHECK_SECONDS:
                checked = now
                self._check_file()
                self._end_silent()
            ready = self._selector.select(min(_CHECK_SECONDS, self._due - now))
            for key, _ in ready:
                if key.fileobj is self._wake:
                    return
                try:
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        self._receive(key.data)
                except Exception:
                    _log.exception("a fault of shared memory")
                    if isinstance(key.data, _Session):
                        self._end(key.data)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        except OSError as error:  # No file descriptors are left. Accepts again once a session has ended.
            _log.warning("a process cannot share memory", extra={"reason": str(error)})
            self._listen(False)
            return
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD_BYTES)
        process, user = wire.peer_of(connection)
        session = _Session(connection, secrets.token_bytes(_SESSION_BYTES), user)
        if self._call_threads is not None:
            session.calls = SessionCalls(self._call_threads, f"{wire.UNIX}uid={user},pid={process}", session.send)
        of_user = sum(other.user == session.user for other in self._sessions.values())
        for count, most, of_whom in (
            (len(self._sessions), MAX_SESSIONS, ""),
            (of_user, MAX_SESSIONS_OF_USER, " of one user"),
        ):
            if count >= most:
                session.reply(f"{count} processes{of_whom} share memory with this server, the maximum")
                session.close()
                return
        with self._lock:
            self._sessions[session.name] = session
        self._selector.register(connection, selectors.EVENT_READ, session)
        session.reply(devices=() if self._devices is None else self._devices.uuids)

    def _receive(self, session: _Session) -> None:
        try:
            packet, descriptors, flags, _ = socket.recv_fds(
                session.connection, wire.MAX_PACKET_BYTES, 8, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except ConnectionError:
            packet, descriptors, flags = b"", [], 0
        try:
            if not packet and not descriptors:  # An empty packet with a descriptor is region number 0.
                self._end(session)
                return
            error = ""
            try:
                if flags & _TRUNCATED:
                    raise InvalidInput("packet", f"got a longer one; expected at most {wire.MAX_PACKET_BYTES} bytes")
                request = pb.SharedMemoryRequest.FromString(packet)
                kind = request.WhichOneof("message")
                if kind is not None and session.calls is not None:
                    self._call(session.calls, request)
                    return
                self._carry_out(session, request, descriptors)
            except (InvalidInput, OSError, DecodeError) as problem:
                error = str(problem)
            session.reply(error)
        finally:
            for descriptor in descriptors:
                self._closer.close(descriptor)

    def _call(self, calls: SessionCalls, request: pb.SharedMemoryRequest) -> None:
        if request.HasField("cancel"):
            calls.cancel(request.cancel)
            return
        due = calls.begin(request.call)
        if due is not None:
            self._due = min(self._due, due)

    def _expire(self, now: float) -> None:
        """Ends the calls whose deadlines have passed, and finds the next deadline."""
        every = [session.calls for session in self._sessions.values() if session.calls is not None]
        self._due = min((due for due in (calls.expire(now) for calls in every) if due is not None), default=math.inf)

    def _carry_out(self, session: _Session, request: pb.SharedMemoryRequest, descriptors: list[int]) -> None:
        if request.release:
            with self._lock:
                session.regions.pop(request.region, None)
            return
        if len(descriptors) != 1:
            raise InvalidInput("region", f"got {len(descriptors)} file descriptors beside it; expected 1")
        of_all_sessions = sum(len(other.regions) for other in self._sessions.values())
        if len(session.regions) >= MAX_REGIONS or of_all_sessions >= self._max_all_regions:
            raise InvalidInput("region", f"{len(session.regions)} regions are shared, the maximum")
        if request.region in session.regions:
            raise InvalidInput("region", f"got {request.region}, which is shared already; expected another number")
        region = self._region(request, descriptors[0])
        if self.nbytes + region.nbytes > self._max_bytes:
            raise InvalidInput(
                "region",
                f"got {region.nbytes} bytes, with {self.nbytes} shared already; expected at most {self._max_bytes} in "
                "all (--max-shared-memory)",
            )
        session.has_shared = True
        with self._lock:
            session.regions[request.region] = region

    def _region(self, request: pb.SharedMemoryRequest, descriptor: int) -> Region | DeviceRegion:
        if not request.HasField("device_memory"):
            return Region(descriptor, self._max_region_bytes)
        return DeviceRegion.imported(request.device_memory, descriptor, self._devices, self._max_region_bytes)

    def _end_silent(self) -> None:
        """Ends the sessions that have not shared anything in time: there is room for so many only."""
        until = time.monotonic() - FIRST_REGION_SECONDS
        for session in [one for one in self._sessions.values() if not one.has_shared and one.since < until]:
            self._end(session)

    def _end(self, session: _Session) -> None:
        with self._lock:
            self._sessions.pop(session.name, None)
        if session.connection.fileno() >= 0:
            with contextlib.suppress(KeyError, RuntimeError):  # Not registered, or the selector is closed.
                self._selector.unregister(session.connection)
            session.close()
        if session.calls is not None:
            session.calls.cancel_all()
        session.regions.clear()
        if threading.current_thread() is self._thread:
            self._listen(True)

    def _listen(self, listen: bool) -> None:
        """Accepts new processes from now on, or does not."""
        if listen and not self._listening:
            self._selector.register(self._listener, selectors.EVENT_READ)
        elif self._listening and not listen:
            self._selector.unregister(self._listener)
        self._listening = listen
