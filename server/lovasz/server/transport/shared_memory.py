"""The Unix socket on which processes on this host share memory with the server, and ask for losses of tensors in it.

A session is a connection. When it ends, so do its calls, and its regions are released, except those that a request
still uses: these live until that request is done. If a process is killed, the kernel closes its connection.
"""

from __future__ import annotations

import itertools
import logging
import math
import mmap
import resource
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from functools import partial
from weakref import WeakKeyDictionary

from google.protobuf.message import DecodeError

from lovasz import wire
from lovasz.device_memory.mapping import Mapping as DeviceMapping
from lovasz.server.errors import SessionLostError
from lovasz.server.memory.shared_devices import SharedDevices
from lovasz.server.transport.device_region import DeviceRegion
from lovasz.server.transport.memory_session import MemorySession, Packet
from lovasz.server.transport.packet_threads import PacketThreads
from lovasz.server.transport.regions import Closer, Region
from lovasz.server.transport.socket_calls import LAST_ANSWERS_SECONDS, SessionCalls, SocketCall, SocketThreads
from lovasz.server.transport.socket_file import Place, SocketFile
from lovasz.server.transport.tensor_bytes import TensorBytes
from lovasz.spec import InvalidInput
from lovasz.v1 import loss_pb2 as pb

_log = logging.getLogger(__name__)

MAX_SESSIONS = 256
MAX_SESSIONS_OF_USER = 192
"""Processes of one user, so that others find a place."""
MAX_REGIONS = wire.MAX_REGIONS
FIRST_REGION_SECONDS = 10.0
"""A process that has shared nothing for this long since it connected is disconnected."""
_DESCRIPTORS_SHARE = 8
"""All regions together may take a quarter of the file descriptors that the process may have: each takes two."""

_SESSION_BYTES = 16
_UNREAD_BYTES = 1 << 20
"""Answers that a caller may leave unread, if the system's limit (net.core.wmem_max) is not lower."""
_BACKLOG = 64
_LOOK_SECONDS = 0.005
_CHECK_SECONDS = 1.0
"""How often it is looked whether the socket's file is still there, who is silent, and whether it can accept again."""


class SharedMemory:
    """Serves one socket, and finds the tensors of requests. A thread of its own looks for what is due at a time.

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
        self._sessions: dict[bytes, MemorySession] = {}
        self._mapped: WeakKeyDictionary[mmap.mmap | DeviceMapping, int] = WeakKeyDictionary()
        self._strangers = itertools.count(1)
        """Numbers for the connections of processes that have none here."""
        self._call_threads: SocketThreads | None = None
        self._due = math.inf
        """When a call's deadline passes, or before (``time.monotonic``)."""
        self._max_all_regions = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _DESCRIPTORS_SHARE
        self._wakes = -math.inf
        """When the thread looks next whether something is due."""
        self._changed = threading.Condition()
        self._sharing = threading.Lock()
        """Held while a region is taken, so that all together are counted."""
        self._listening = self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="shared-memory", daemon=True)

    @property
    def sessions(self) -> int:
        """Processes that are connected."""
        return len(self._sessions)

    @property
    def nbytes(self) -> int:
        """Bytes of all regions that are shared, and of those that calls still use."""
        with self._lock:
            return sum(self._mapped.values())

    @property
    def device_nbytes(self) -> int:
        """Those of them that are device memory."""
        with self._lock:
            return sum(nbytes for mapping, nbytes in self._mapped.items() if isinstance(mapping, DeviceMapping))

    def offer(self, threads: SocketThreads) -> None:
        """Takes calls on the socket, too, and reads all packets in these threads; comes before :meth:`start`."""
        self._call_threads = threads

    def start(self) -> None:
        """Listens on the socket.

        Raises:
            OSError: the socket cannot be created.
        """
        self._open()
        if self._call_threads is None:
            self._packets = PacketThreads(1, "shared-memory-packets")
            self._packets.start_all()
        else:
            self._packets = self._call_threads.packets
        self._packets.add(self._listener.fileno(), self._accept)
        self._listening = True
        self._thread.start()

    def stop(self) -> None:
        """Ends all sessions and removes the socket. Calls that are about to be answered have a moment left."""
        if not self._thread.is_alive():
            return
        until = time.monotonic() + LAST_ANSWERS_SECONDS
        while time.monotonic() < until and any(session.calls for session in self._every()):
            time.sleep(_LOOK_SECONDS)
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()
        with self._lock:
            self._packets.remove(self._listener.fileno())
            self._listener.close()
        self._file.remove()
        for session in self._every():
            self._end(session)
        if self._call_threads is None:
            self._packets.stop(wait=True)

    def is_on_device(self, request: wire.Request) -> bool:
        """Whether the tensors of a request are in device memory; False if there is no such region."""
        return self._devices is not None and isinstance(self._found(request)[1], DeviceRegion)

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

    def _found(self, request: wire.Request) -> tuple[MemorySession | None, Region | DeviceRegion | None]:
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
        with self._lock:
            self._packets.remove(old.fileno())
            self._packets.add(self._listener.fileno(), self._accept)
            self._listening = True
            old.close()
        old_file.remove()
        _log.warning("a socket's file was removed; created it again", extra={"path": self.path})

    def _listen_again(self) -> None:
        """Tries again to accept, if there were no file descriptors left."""
        with self._lock:
            if not self._listening:
                self._listening = True
                self._packets.again(self._listener.fileno())

    def _serve(self) -> None:
        """Does what is due at a time; packets wake other threads."""
        checked = time.monotonic()
        while not self._stopping:
            now = time.monotonic()
            if now >= self._due:
                self._expire(now)
            if now >= checked + _CHECK_SECONDS:
                checked = now
                self._check_file()
                self._listen_again()
                self._end_silent()
            with self._changed:
                self._wakes = min(now + _CHECK_SECONDS, self._due)
                if not self._stopping:
                    self._changed.wait(max(0.0, self._wakes - time.monotonic()))

    def _accept(self) -> None:
        with self._lock:
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionError):
                connection = None
            except OSError as error:
                if not self._stopping:  # No file descriptors are left.
                    _log.warning("a process cannot share memory", extra={"reason": str(error)})
                    self._listening = False
                return
        try:
            if connection is not None:
                self._greet(connection)
        finally:
            with self._lock:
                if not self._stopping:
                    self._packets.again(self._listener.fileno())

    def _greet(self, connection: socket.socket) -> None:
        """Begins a session, or refuses it."""
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD_BYTES)
        process, user = wire.peer_of(connection)
        session = MemorySession(connection, secrets.token_bytes(_SESSION_BYTES), user, self._packets)
        if self._call_threads is not None:
            # A process of another PID namespace is number 0, as are all others there.
            who = f"pid={process}" if process else f"connection={next(self._strangers)}"
            session.calls = SessionCalls(self._call_threads, f"{wire.UNIX}uid={user},{who}", session.send)
        every = self._every()
        of_user = sum(other.user == session.user for other in every)
        for count, most, of_whom in (
            (len(every), MAX_SESSIONS, ""),
            (of_user, MAX_SESSIONS_OF_USER, " of one user"),
        ):
            if count >= most:
                session.reply(f"{count} processes{of_whom} share memory with this server, the maximum")
                session.close()
                return
        with self._lock:
            self._sessions[session.name] = session
        session.reply(devices=() if self._devices is None else self._devices.uuids)
        self._packets.add(connection.fileno(), partial(self._receive, session))

    def _every(self) -> list[MemorySession]:
        with self._lock:
            return list(self._sessions.values())

    def _receive(self, session: MemorySession) -> None:
        """Reads a packet and works on it. The next one is read meanwhile if this is a call."""
        try:
            call = self._read(session)
        except Exception:
            _log.exception("a fault of shared memory")
            self._end(session)
            return
        if call is not None:
            assert self._call_threads is not None
            self._call_threads.serve(call)

    def _read(self, session: MemorySession) -> SocketCall | None:
        """Reads a packet, and does what it asks for; a call is left to do."""
        packet = session.receive()
        call: SocketCall | None = None
        if packet is not None:
            try:
                if not packet.data and not packet.descriptors:  # With a descriptor it is region number 0.
                    self._end(session)
                    return None
                call = self._take(session, packet)
            finally:
                for descriptor in packet.descriptors:
                    self._closer.close(descriptor)
        session.read_on()
        return call

    def _take(self, session: MemorySession, packet: Packet) -> SocketCall | None:
        error = ""
        try:
            if packet.is_cut:
                raise InvalidInput("packet", f"got a longer one; expected at most {wire.MAX_PACKET_BYTES} bytes")
            request = pb.SharedMemoryRequest.FromString(packet.data)
            kind = request.WhichOneof("message")
            if kind is not None and session.calls is not None:
                return self._call(session.calls, request)
            with self._sharing:
                self._carry_out(session, request, packet.descriptors)
        except (InvalidInput, OSError, DecodeError) as problem:
            error = str(problem)
        session.reply(error)
        return None

    def _call(self, calls: SessionCalls, request: pb.SharedMemoryRequest) -> SocketCall | None:
        if request.HasField("cancel"):
            calls.cancel(request.cancel)
            return None
        call = calls.begin(request.call)
        if call is not None and call.due is not None and call.due < self._due:
            self._note_due(call.due)
        return call

    def _note_due(self, due: float) -> None:
        with self._changed:
            self._due = min(self._due, due)
            if due < self._wakes:
                self._changed.notify()

    def _expire(self, now: float) -> None:
        """Ends the calls whose deadlines have passed, and finds the next deadline."""
        self._due = math.inf  # Before: a call that begins meanwhile sets it again.
        every = [session.calls for session in self._every() if session.calls is not None]
        self._note_due(
            min((due for due in (calls.expire(now) for calls in every) if due is not None), default=math.inf)
        )

    def _carry_out(self, session: MemorySession, request: pb.SharedMemoryRequest, descriptors: Sequence[int]) -> None:
        if request.release:
            with self._lock:
                session.regions.pop(request.region, None)
            return
        if len(descriptors) != 1:
            raise InvalidInput("region", f"got {len(descriptors)} file descriptors beside it; expected 1")
        regions_of = [(other.user, len(other.regions)) for other in self._every()]
        of_all_sessions, of_user = (
            sum(n for _, n in regions_of),
            sum(n for user, n in regions_of if user == session.user),
        )
        most_of_user = max(self._max_all_regions * MAX_SESSIONS_OF_USER // MAX_SESSIONS, 1)
        for count, most, of_whom in (
            (len(session.regions), MAX_REGIONS, ""),
            (of_user, most_of_user, " by one user, with the server's limit of open files"),
            (of_all_sessions, self._max_all_regions, " by all processes, with the server's limit of open files"),
        ):
            if count >= most:
                raise InvalidInput("region", f"{count} regions are shared{of_whom}, the maximum")
        if request.region in session.regions:
            raise InvalidInput("region", f"got {request.region}, which is shared already; expected another number")
        region = self._region(request, descriptors[0])
        if self.nbytes + region.nbytes > self._max_bytes:
            raise InvalidInput(
                "region",
                f"got {region.nbytes} bytes, with {self.nbytes} shared already; expected at most {self._max_bytes} in "
                "all (--max-shared-memory)",
            )
        if isinstance(region, Region):
            region.keep_pages()
        session.has_shared = True
        with self._lock:
            session.regions[request.region] = region
            self._mapped[region.mapping] = region.nbytes

    def _region(self, request: pb.SharedMemoryRequest, descriptor: int) -> Region | DeviceRegion:
        if not request.HasField("device_memory"):
            return Region(descriptor, self._max_region_bytes)
        return DeviceRegion.imported(request.device_memory, descriptor, self._devices, self._max_region_bytes)

    def _end_silent(self) -> None:
        """Ends the sessions that have not shared anything in time: there is room for so many only."""
        until = time.monotonic() - FIRST_REGION_SECONDS
        for session in [one for one in self._every() if not one.has_shared and one.since < until]:
            self._end(session)

    def _end(self, session: MemorySession) -> None:
        session.close()
        with self._lock:
            self._sessions.pop(session.name, None)
        if session.calls is not None:
            session.calls.cancel_all()
        session.regions.clear()
