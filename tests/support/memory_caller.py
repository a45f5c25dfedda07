"""A process that shares memory and asks on the socket, and says what it likes, without the client's care."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator

from lovasz import wire
from lovasz.server.launch import ServerProcess
from lovasz.v1 import loss_pb2 as pb

TIMEOUT = 30.0
"""Seconds; nothing takes so long."""
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def memory_path(server: ServerProcess) -> str:
    """The path of the socket on which a server takes shared memory."""
    return next(t for t in server.targets if t.startswith("unix:")).removeprefix("unix:") + wire.MEMORY_SUFFIX


class MemoryCaller:
    """A connection to the shared-memory socket.

    Attributes:
        hello: the server's first packet; None if it ended the session.
    """

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(TIMEOUT)
        self.socket.connect(path)
        self.hello = self.reply()

    @property
    def session(self) -> bytes:
        assert self.hello is not None
        return self.hello.session

    def reply(self) -> pb.SharedMemoryReply | None:
        """The next packet; None if the server has ended the session."""
        try:
            packet = self.socket.recv(1 << 17)
        except ConnectionResetError:
            return None
        return pb.SharedMemoryReply.FromString(packet) if packet else None

    def say(self, packet: bytes, *given: int) -> str | None:
        """The error that a packet is answered with, empty if it was none; None if the server has ended the session."""
        if given:
            socket.send_fds(self.socket, [packet], list(given))
        else:
            self.socket.send(packet)
        reply = self.reply()
        return None if reply is None else reply.error

    def share(self, region: int, *given: int) -> str | None:
        return self.say(pb.SharedMemoryRequest(region=region).SerializeToString(), *given)

    def release(self, region: int) -> str | None:
        return self.say(pb.SharedMemoryRequest(region=region, release=True).SerializeToString())

    def ask(self, number: int, header: pb.RequestHeader, seconds: float | None = None) -> None:
        """Makes a call, and does not wait for its answer."""
        call = pb.SharedMemoryCall(number=number, header=header, timeout_seconds=seconds)
        self.socket.send(pb.SharedMemoryRequest(call=call).SerializeToString())

    def cancel(self, number: int) -> None:
        self.socket.send(pb.SharedMemoryRequest(cancel=number).SerializeToString())

    def answer(self) -> pb.SharedMemoryAnswer:
        """The next packet, which is the answer to a call."""
        reply = self.reply()
        assert reply is not None
        assert reply.HasField("answer")
        return reply.answer

    def close(self) -> None:
        self.socket.close()


@contextlib.contextmanager
def memfd(
    nbytes: int = 4096, seals: int = SEALS, *, name: str = "lovasz-test", sparse: bool = False, flags: int = 0
) -> Iterator[int]:
    """A descriptor of memory that a region may be made of, if it is not sparse, and has no other flags."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        if sparse:
            os.ftruncate(descriptor, nbytes)
        elif nbytes:
            os.posix_fallocate(descriptor, 0, nbytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        yield descriptor
    finally:
        os.close(descriptor)
