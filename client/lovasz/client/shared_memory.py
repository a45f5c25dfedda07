"""Memory that is shared with a server on this host: a session with it, and the regions that hold tensors.

The contract is in ``loss.proto`` (SharedTensors): a region is a memfd, handed over on a Unix socket beside gRPC's.
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import socket
import threading
import weakref

from lovasz import wire
from lovasz.client.errors import LossError, ServerUnavailableError
from lovasz.client.memory import Memory, MemoryPool
from lovasz.v1 import loss_pb2 as pb

_MAX_PACKET_BYTES = 4096
_ALIGNMENT = 64


class Region(Memory):
    """Memory that can be shared with another process."""

    def __init__(self, nbytes: int) -> None:
        self.descriptor = os.memfd_create("lovasz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # All of it at once, which is faster than page by page at the first writes.
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
    """A connection on which regions are handed over. The server lets go of them when it ends."""

    _numbers = itertools.count(1)

    def __init__(self, path: str, timeout: float) -> None:
        """
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
        """Hands a region over, unless the server has it.

        Raises:
            LossError: the server does not take it, or is gone.
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
            self.close()  # A late answer would be taken for that to the next packet.
            raise ServerUnavailableError(f"shared memory: {error.strerror or error}") from None
        region.session, region.number = self, number

    def release(self, region: Region) -> None:
        """Takes a region back."""
        region.session = None
        try:
            with self._lock:
                packet = pb.SharedMemoryRequest(region=region.number, release=True)
                self._socket.send(packet.SerializeToString())
                self._reply()
        except (OSError, LossError):
            self.close()  # And with the session goes what was shared.

    def close(self) -> None:
        self._socket.close()

    def _reply(self) -> pb.SharedMemoryReply:
        packet = self._socket.recv(_MAX_PACKET_BYTES)
        if not packet:
            raise ConnectionResetError("the server ended the session")
        reply = pb.SharedMemoryReply.FromString(packet)
        if reply.error:
            raise LossError(f"shared memory: {reply.error}")
        return reply


def places(request: wire.Request) -> tuple[int, int, int, int]:
    """Where logits, labels and gradient lie in a region, and its size."""
    place, starts = 0, []
    for size in (request.logits.nbytes, request.labels.nbytes, request.grad_bytes):
        starts.append(place)
        place = -(-(place + size) // _ALIGNMENT) * _ALIGNMENT
    return starts[0], starts[1], starts[2], place


class SharedMemory:
    """The regions of one client, and its session with the server, which is begun anew when it has ended."""

    def __init__(self, path: str) -> None:
        """
        Args:
            path: of the socket on which the server takes regions.
        """
        self._path = path
        self._lock = threading.Lock()
        self._session: Session | None = None
        self.regions: MemoryPool[Region] = MemoryPool(Region)

    def share(self, region: Region, timeout: float) -> bytes:
        """Sees to it that the server has the region; returns the session's name.

        Raises:
            ServerUnavailableError: no server takes shared memory there.
            LossError: the server does not take this region.
        """
        with self._lock:
            if self._session is not None:
                try:
                    self._session.share(region)
                    return self._session.name
                except ServerUnavailableError:  # Of a server that has gone; perhaps there is another by now.
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
        """The server does not know the session any more: the next call begins another."""
        with self._lock:
            if self._session is not None:
                self._end(self._session)

    def close(self) -> None:
        self.forget()
        self.regions.close()

    def _end(self, session: Session) -> None:
        session.close()
        if session is self._session:
            self._session = None
