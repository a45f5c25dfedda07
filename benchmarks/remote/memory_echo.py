"""A bare echo over the shared-memory socket's kind: the same bytes move, and nothing is computed."""

from __future__ import annotations

import mmap
import os
import socket
import tempfile
import threading
from collections.abc import Sequence

from lovasz.wire import MAX_PACKET_BYTES


class MemoryEchoServer:
    """Answers each packet with ``answer_bytes`` bytes. Runs in a child process.

    Before, it copies the request's tensors out of the memory that came with the first packet, and as many bytes as the
    gradient has back into it.
    """

    def __init__(self, payload_bytes: int, grad_bytes: int, answer_bytes: int) -> None:
        self._sizes = payload_bytes, grad_bytes
        self._answer = bytes(answer_bytes)
        self._folder = tempfile.TemporaryDirectory()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(os.path.join(self._folder.name, "echo"))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def target(self) -> str:
        name: str = self._listener.getsockname()
        return name

    def close(self) -> None:
        self._listener.close()
        self._folder.cleanup()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        payload_bytes, grad_bytes = self._sizes
        payload, grad = bytearray(payload_bytes), bytes(grad_bytes)
        with connection:
            _, (descriptor,), _, _ = socket.recv_fds(connection, MAX_PACKET_BYTES, 1)
            with mmap.mmap(descriptor, payload_bytes + grad_bytes) as memory:
                os.close(descriptor)
                while connection.recv(MAX_PACKET_BYTES):
                    payload[:] = memory[:payload_bytes]
                    memory[payload_bytes:] = grad
                    connection.send(self._answer)


class MemoryEchoPeer:
    """A connection to a :class:`MemoryEchoServer`. A call copies the tensors into memory, sends a packet and waits."""

    def __init__(self, target: str, parts: Sequence[memoryview], grad_bytes: int, packet_bytes: int) -> None:
        """
        Args:
            parts: the bytes of the tensors.
            packet_bytes: the size of a packet.
        """
        self._parts = parts
        self._packet = bytes(packet_bytes)
        nbytes = sum(part.nbytes for part in parts) + grad_bytes
        descriptor = os.memfd_create("echo", os.MFD_CLOEXEC)
        os.posix_fallocate(descriptor, 0, nbytes)
        self._memory = mmap.mmap(descriptor, nbytes)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(target)
        socket.send_fds(self._socket, [b"memory"], [descriptor])
        os.close(descriptor)

    def __call__(self) -> bytes:
        place = 0
        for part in self._parts:
            self._memory[place : place + part.nbytes] = part.cast("B")
            place += part.nbytes
        self._socket.send(self._packet)
        return self._socket.recv(MAX_PACKET_BYTES)

    def close(self) -> None:
        self._socket.close()
        self._memory.close()
