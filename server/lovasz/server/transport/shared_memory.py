"""Memory that callers on this host share: a Unix socket on which they hand over regions, and where these are found.

A session is a connection. When it ends, for whatever reason (the kernel closes it for a process that was killed), its
regions are let go; a region that a request still uses lives until that request is done. A region has no name that could
be left behind, and is sealed against shrinking, so that reading it cannot kill the server.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import resource
import secrets
import selectors
import socket
import stat
import threading
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError

from lovasz import wire
from lovasz.server.errors import SessionLostError
from lovasz.spec import InvalidInput
from lovasz.v1 import loss_pb2 as pb

_log = logging.getLogger(__name__)

MAX_SESSIONS = 256
MAX_REGIONS = 64
"""Of one session."""
_DESCRIPTORS_SHARE = 4
"""Of the descriptors that the process may have, all regions together may take one in so many."""

_MAX_PACKET_BYTES = 1024
_SESSION_BYTES = 16
_BACKLOG = 64


@dataclass
class _Session:
    connection: socket.socket
    name: bytes
    regions: dict[int, memoryview] = field(default_factory=dict)


class SharedMemory:
    """Serves the socket, in a thread of its own, and finds the tensors of requests."""

    def __init__(self, path: str) -> None:
        """
        Args:
            path: of the socket, which is made by :meth:`start` and removed by :meth:`stop`.
        """
        self.path = path
        self._lock = threading.Lock()
        self._sessions: dict[bytes, _Session] = {}
        self._max_all_regions = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _DESCRIPTORS_SHARE
        self._thread = threading.Thread(target=self._serve, name="shared-memory", daemon=True)

    @property
    def sessions(self) -> int:
        return len(self._sessions)

    @property
    def nbytes(self) -> int:
        """Bytes of all regions that are shared."""
        with self._lock:
            return sum(region.nbytes for session in self._sessions.values() for region in session.regions.values())

    def start(self) -> None:
        """Raises:
        OSError: the socket cannot be made.
        """
        # Of a server that was killed; `Server` has seen that none is alive there.
        if os.path.exists(self.path) and stat.S_ISSOCK(os.stat(self.path).st_mode):
            os.unlink(self.path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listener.bind(self.path)
        except OSError:
            self._listener.close()
            raise
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._listening = False
        self._listen(True)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._thread.start()

    def stop(self) -> None:
        """Ends all sessions and removes the socket."""
        if not self._thread.is_alive():
            return
        self._waker.close()
        self._thread.join()
        self._selector.close()
        for session in list(self._sessions.values()):
            self._end(session)
        self._listener.close()
        self._wake.close()
        if os.path.exists(self.path):
            os.unlink(self.path)

    def tensors(self, request: wire.Request) -> tuple[memoryview, memoryview, memoryview]:
        """The bytes of the logits, of the labels, and of the room for the gradient (none, if none is wanted).

        Raises:
            SessionLostError: the session is not there; its caller can begin another.
            InvalidInput: the region is not there, or a tensor does not lie within it.
        """
        shared = request.shared
        assert shared is not None
        with self._lock:
            session = self._sessions.get(shared.session)
            region = session.regions.get(shared.region) if session is not None else None
        if session is None:
            raise SessionLostError("the session of the shared memory has ended, or belongs to another server")
        if region is None:
            raise InvalidInput(
                "shared_tensors.region", f"got {shared.region}; expected the number of a region that is shared"
            )
        logits, labels, grad = (
            _part(region, name, offset, size)
            for name, offset, size in (
                ("logits", shared.logits_offset, request.logits.nbytes),
                ("labels", shared.labels_offset, request.labels.nbytes),
                ("grad", shared.grad_offset, request.grad_bytes),
            )
        )
        return logits, labels, grad

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
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
        except OSError as error:  # No descriptors are left: the next is accepted when a session has ended.
            _log.warning("a process cannot share memory", extra={"reason": str(error)})
            self._listen(False)
            return
        connection.setblocking(False)
        session = _Session(connection, secrets.token_bytes(_SESSION_BYTES))
        if len(self._sessions) >= MAX_SESSIONS:
            _reply(session, error=f"{MAX_SESSIONS} processes share memory with this server, as many as may")
            connection.close()
            return
        with self._lock:
            self._sessions[session.name] = session
        self._selector.register(connection, selectors.EVENT_READ, session)
        if not _reply(session):
            self._end(session)

    def _receive(self, session: _Session) -> None:
        try:
            packet, descriptors, _, _ = socket.recv_fds(
                session.connection, _MAX_PACKET_BYTES, 8, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except ConnectionError:
            packet, descriptors = b"", []
        try:
            if not packet and not descriptors:  # (A region of number 0 is an empty packet.)
                self._end(session)
                return
            error = ""
            try:
                self._carry_out(session, pb.SharedMemoryRequest.FromString(packet), descriptors)
            except (InvalidInput, OSError, DecodeError) as problem:
                error = str(problem)
            if not _reply(session, error):
                self._end(session)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _carry_out(self, session: _Session, request: pb.SharedMemoryRequest, descriptors: list[int]) -> None:
        if request.release:
            with self._lock:
                session.regions.pop(request.region, None)
            return
        if len(descriptors) != 1:
            raise InvalidInput("region", f"got {len(descriptors)} file descriptors beside it; expected 1")
        everyones = sum(len(other.regions) for other in self._sessions.values())
        if len(session.regions) >= MAX_REGIONS or everyones >= self._max_all_regions:
            raise InvalidInput("region", f"{len(session.regions)} regions are shared, as many as may be")
        if request.region in session.regions:
            raise InvalidInput("region", f"got {request.region}, which is shared already; expected another number")
        region = _mapped(descriptors[0])
        with self._lock:
            session.regions[request.region] = region

    def _end(self, session: _Session) -> None:
        with self._lock:
            self._sessions.pop(session.name, None)
        if session.connection.fileno() >= 0:
            with contextlib.suppress(KeyError, RuntimeError):  # Not registered, or the selector is closed.
                self._selector.unregister(session.connection)
            session.connection.close()
        session.regions.clear()
        if threading.current_thread() is self._thread:
            self._listen(True)

    def _listen(self, listen: bool) -> None:
        """Whether new processes are accepted."""
        if listen and not self._listening:
            self._selector.register(self._listener, selectors.EVENT_READ)
        elif self._listening and not listen:
            self._selector.unregister(self._listener)
        self._listening = listen


def _reply(session: _Session, error: str = "") -> bool:
    """Sends the answer to a packet; False if the caller is gone, or takes no answers."""
    try:
        session.connection.send(pb.SharedMemoryReply(session=session.name, error=error).SerializeToString())
    except OSError:
        return False
    return True


def _mapped(descriptor: int) -> memoryview:
    """Raises:
    InvalidInput: it is no memory that is safe to read.
    OSError: it cannot be mapped.
    """
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        raise InvalidInput("region", "got a file descriptor of another kind; expected a memfd") from None
    if not seals & fcntl.F_SEAL_SHRINK:
        raise InvalidInput("region", "got a memfd that can shrink; expected one sealed with F_SEAL_SHRINK")
    size = os.fstat(descriptor).st_size
    if size < 1:
        raise InvalidInput("region", "got an empty memfd; expected at least one byte")
    return memoryview(mmap.mmap(descriptor, size))


def _part(region: memoryview, name: str, offset: int, size: int) -> memoryview:
    if not 0 <= offset <= region.nbytes - size:
        raise InvalidInput(
            f"shared_tensors.{name}_offset",
            f"got {offset} for {size} bytes in a region of {region.nbytes}; expected a place within it",
        )
    return region[offset : offset + size]
