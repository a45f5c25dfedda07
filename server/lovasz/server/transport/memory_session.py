"""A session of shared memory: a process that is connected to the socket, its regions, and its calls in flight."""

from __future__ import annotations

import array
import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lovasz import wire
from lovasz.server.transport.device_region import DeviceRegion
from lovasz.server.transport.packet_threads import PacketThreads
from lovasz.server.transport.regions import Region
from lovasz.server.transport.socket_calls import SessionCalls
from lovasz.v1 import loss_pb2 as pb

_MOST_DESCRIPTORS = 253
"""All that may come with a packet (SCM_MAX_FD): what is left out, the kernel closes here, and that may take minutes."""
_ANCILLARY_BYTES = socket.CMSG_SPACE(_MOST_DESCRIPTORS * array.array("i").itemsize)
_RECEIVE_FLAGS = int(socket.MSG_CMSG_CLOEXEC)
_TRUNCATED = int(socket.MSG_TRUNC)


class Packet(NamedTuple):
    """What came.

    Attributes:
        data: empty, without descriptors: the session has ended.
        descriptors: whoever reads the packet has to close them.
        is_cut: it was longer than packets may be.
    """

    data: bytes
    descriptors: Sequence[int]
    is_cut: bool


_NOTHING_MORE = Packet(b"", (), False)


@dataclass(eq=False)
class MemorySession:
    """A process that is connected, since when (``time.monotonic``), and whether it has ever shared a region.

    Attributes:
        calls: its calls in flight; None if the socket takes none.
    """

    connection: socket.socket
    name: bytes
    user: int
    packets: PacketThreads
    since: float = field(default_factory=time.monotonic)
    has_shared: bool = False
    regions: dict[int, Region | DeviceRegion] = field(default_factory=dict)
    calls: SessionCalls | None = None
    _sending: threading.Lock = field(default_factory=threading.Lock)

    def receive(self) -> Packet | None:
        """The next packet; None if there is none."""
        try:
            data, ancillary, flags, _ = self.connection.recvmsg(wire.MAX_PACKET_BYTES, _ANCILLARY_BYTES, _RECEIVE_FLAGS)
        except BlockingIOError:
            return None
        except OSError:  # The other side has reset it, or it was closed here.
            return _NOTHING_MORE
        descriptors = array.array("i")
        for level, kind, part in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors.frombytes(part[: len(part) - len(part) % descriptors.itemsize])
        return Packet(data, descriptors, bool(flags & _TRUNCATED))

    def read_on(self) -> None:
        """Lets a thread read the next packet."""
        with self._sending:
            if self.connection.fileno() >= 0:
                self.packets.again(self.connection.fileno())

    def send(self, reply: pb.SharedMemoryReply) -> None:
        """Sends a packet. If the caller is gone, or reads so slowly that the socket is full, the session ends."""
        packet = reply.SerializeToString()
        with self._sending:
            try:
                self.connection.send(packet)
            except OSError:
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)  # So that a thread reads its end.

    def reply(self, error: str = "", devices: Sequence[bytes] = ()) -> None:
        """Answers a packet about a region, or greets."""
        takes_calls = self.calls is not None
        self.send(pb.SharedMemoryReply(session=self.name, error=error, takes_calls=takes_calls, devices=devices))

    def close(self) -> None:
        """Closes the connection; other threads may be about to send."""
        with self._sending:
            if self.connection.fileno() >= 0:
                with contextlib.suppress(FileNotFoundError):  # It was refused before anybody read from it.
                    self.packets.remove(self.connection.fileno())
                self.connection.close()
