"""The shared-memory socket: packets of many threads to the server, and its replies to each of them.

The contract is in ``loss.proto`` (SharedTensors). There is no thread for the replies: one of the threads that wait
reads for all. So a call that is alone needs no other thread.
"""

from __future__ import annotations

import itertools
import math
import queue
import select
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from lovasz import wire
from lovasz.client.errors import LossError, ServerUnavailableError
from lovasz.client.turn import Turn
from lovasz.v1 import loss_pb2 as pb

_MOST_POLL_SECONDS = 0.5
"""Python notices Ctrl-C late if it comes just before a thread begins to wait: not before it wakes."""
_CLOSE_SECONDS = 1.0
"""How long a thread that reads may take to notice that the socket was closed."""


class SocketError(grpc.RpcError):
    """A call on the socket failed. It tells what gRPC's own errors do, so that retries and translation take both."""

    def __init__(self, code: grpc.StatusCode, text: str, retry_after_milliseconds: int | None = None) -> None:
        super().__init__(code, text)
        self._code, self._text, self._retry_after = code, text, retry_after_milliseconds

    @classmethod
    def of(cls, error: pb.CallError) -> SocketError:
        """The error that the server answered with."""
        code = grpc.StatusCode.__members__.get(error.code, grpc.StatusCode.UNKNOWN)
        has_delay = error.HasField("retry_after_milliseconds")
        return cls(code, error.text, error.retry_after_milliseconds if has_delay else None)

    @classmethod
    def late(cls) -> SocketError:
        """There was no answer in time."""
        return cls(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._text

    def trailing_metadata(self) -> tuple[Any, ...]:
        return () if self._retry_after is None else ((wire.PUSHBACK_KEY, str(self._retry_after)),)


class _Waiter:
    """A thread that waits for a reply, or for its turn to read."""

    __slots__ = ("is_done", "reply", "wake")

    def __init__(self) -> None:
        self.is_done = False
        self.reply: pb.SharedMemoryReply | None = None
        """None once it is done: the connection has ended."""
        self.wake: queue.SimpleQueue[None] = queue.SimpleQueue()

    def end(self, reply: pb.SharedMemoryReply | None) -> None:
        self.reply, self.is_done = reply, True
        self.wake.put(None)


class MemorySocket:
    """A connection. Threads can share it.

    Attributes:
        hello: the server's first packet.
        is_closed: whether it has ended.
    """

    def __init__(self, path: str, timeout: float) -> None:
        """Connects.

        Raises:
            OSError: no server is there, or it does not answer.
            LossError: it refuses the connection.
        """
        self.is_closed = False
        self._lock = threading.Lock()
        """Held for a moment only: for the tables of waiters, and for each send."""
        self._reading = Turn()
        self._numbers = itertools.count(1)
        self._calls: dict[int, _Waiter] = {}
        self._plain: deque[_Waiter] = deque()
        """Those of packets about regions, whose replies come in order, also where nobody waits."""
        self._buffer = bytearray(wire.MAX_PACKET_BYTES)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.settimeout(max(0.0, timeout))
            self._socket.connect(path)
            self._socket.setblocking(False)
            self._readable = select.poll()
            self._readable.register(self._socket, select.POLLIN)
            hello = _Waiter()
            self._plain.append(hello)
            self.hello = self._result(hello, time.monotonic() + timeout)
        except BaseException:
            self._socket.close()
            raise
        weakref.finalize(self, self._socket.close)  # For clients that nobody closes.

    @property
    def peer(self) -> tuple[int, int]:
        """The process id and the user id of who listens."""
        return wire.peer_of(self._socket)

    def ask(self, request: pb.SharedMemoryRequest, descriptors: Sequence[int], timeout: float) -> None:
        """Sends a packet about a region, and waits for the reply. If that fails, the connection ends.

        Raises:
            TimeoutError: there was no reply in time; the connection goes on if the packet was sent.
            OSError: the connection has ended.
            LossError: the server refuses it.
        """
        waiter, deadline, is_sent = _Waiter(), time.monotonic() + timeout, False
        try:
            self._send(request.SerializeToString(), deadline, waiter, descriptors=descriptors)
            is_sent = True
            self._result(waiter, deadline)
        except LossError:
            raise
        except BaseException as error:
            if not (is_sent and isinstance(error, TimeoutError)):
                self.close()
            raise

    def tell(self, request: pb.SharedMemoryRequest, timeout: float) -> None:
        """Sends a packet about a region, and does not wait for the reply, which is nobody's.

        Args:
            timeout: seconds to wait for a server that does not read.

        Raises:
            OSError: it cannot be sent in time, or the connection has ended.
        """
        waiter = _Waiter()
        waiter.is_done = True
        self._send(request.SerializeToString(), time.monotonic() + timeout, waiter)

    def call(self, packet: pb.SharedMemoryRequest, timeout: float) -> pb.ResponseHeader:
        """Sends a packet with a call, whose number and timeout are set here, and waits for its answer.

        Raises:
            SocketError: it failed, or there was no answer in time, or the connection has ended.
        """
        number = packet.call.number = next(self._numbers)
        packet.call.timeout_seconds = timeout
        waiter, deadline = _Waiter(), time.monotonic() + timeout
        try:
            self._send(packet.SerializeToString(), deadline, waiter, number)
            self._wait(waiter, deadline)
        except TimeoutError:
            self._cancel(number)
            raise SocketError.late() from None
        except OSError as error:
            self.close()
            raise _lost(error.strerror or str(error)) from None
        except BaseException:
            self._cancel(number)
            raise
        if waiter.reply is None:
            raise _lost("the server ended the session")
        answer = waiter.reply.answer
        if not answer.HasField("header"):
            raise SocketError.of(answer.error)
        return answer.header

    def close(self) -> None:
        """Ends the connection, and all calls on it."""
        with self._lock:
            self.is_closed = True
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # Wakes the thread that reads.
        self._end_all()
        if self._reading.call(self._close_socket, _CLOSE_SECONDS) is None:
            self._close_socket()

    def _close_socket(self) -> None:
        with self._lock:
            self._socket.close()

    def drop(self) -> None:
        """Closes this process's side after a fork: the connection is the parent's."""
        self.is_closed = True
        self._socket.close()

    def _send(
        self,
        packet: bytes,
        deadline: float,
        waiter: _Waiter | None = None,
        number: int | None = None,
        descriptors: Sequence[int] = (),
    ) -> None:
        """Sends a packet.

        Args:
            packet: with a call, or about a region.
            deadline: until when it waits for a server that does not read.
            waiter: who waits for the reply; None: nobody.
            number: that of the call; None: the packet is about a region.
            descriptors: go along with it.
        """
        while True:
            with self._lock:
                if self.is_closed:
                    raise ConnectionResetError("the session has ended")
                try:
                    if descriptors:
                        socket.send_fds(self._socket, [packet], list(descriptors))
                    else:
                        self._socket.send(packet)
                except BlockingIOError:  # The server does not read as fast as packets come.
                    pass
                else:
                    if waiter is not None and number is not None:
                        self._calls[number] = waiter
                    elif waiter is not None:
                        self._plain.append(waiter)
                    return
            writable = select.poll()
            writable.register(self._socket, select.POLLOUT)
            writable.poll(_milliseconds(deadline))

    def _cancel(self, number: int) -> None:
        with self._lock:
            self._calls.pop(number, None)
        with suppress(OSError):
            self._send(pb.SharedMemoryRequest(cancel=number).SerializeToString(), deadline=0.0)

    def _result(self, waiter: _Waiter, deadline: float) -> pb.SharedMemoryReply:
        self._wait(waiter, deadline)
        if waiter.reply is None:
            raise ConnectionResetError("the server ended the session")
        if waiter.reply.error:
            raise LossError(f"shared memory: {waiter.reply.error}")
        return waiter.reply

    def _wait(self, waiter: _Waiter, deadline: float) -> None:
        """Waits for a reply. One of the waiting threads reads; when it is done, it wakes the next."""
        try:
            while not waiter.is_done:
                if self._reading.call(partial(self._read_until_done, waiter, deadline)) is None:
                    try:
                        waiter.wake.get(timeout=max(0.0, min(_MOST_POLL_SECONDS, deadline - time.monotonic())))
                    except queue.Empty:
                        if time.monotonic() >= deadline:
                            raise TimeoutError("timed out") from None
        finally:
            waiter.is_done = True  # A late reply is nobody's.
            self._wake_another()

    def _read_until_done(self, waiter: _Waiter, deadline: float) -> None:
        while not waiter.is_done:
            self._read(deadline)

    def _wake_another(self) -> None:
        """If nobody reads, another thread that waits has to.

        A thread that waits is in a table before it sees that somebody reads: the tables can be looked at unlocked.
        """
        if not self._calls and not self._plain:
            return
        with self._lock:
            if self._reading.is_free:
                waiting = itertools.chain(self._calls.values(), self._plain)
                another = next((waiter for waiter in waiting if not waiter.is_done), None)
                if another is not None:
                    another.wake.put(None)

    def _read(self, deadline: float) -> None:
        """Waits for a packet and hands it to whom it is for."""
        if not self._readable.poll(_milliseconds(deadline)):
            return
        try:
            size = self._socket.recv_into(self._buffer)
            if size:
                self._hand_over(pb.SharedMemoryReply.FromString(bytes(memoryview(self._buffer)[:size])))
                return
        except BlockingIOError:
            return
        except (OSError, DecodeError):
            pass
        except BaseException:  # Ctrl-C: a packet may be lost.
            self._end_all()
            raise
        self._end_all()

    def _hand_over(self, reply: pb.SharedMemoryReply) -> None:
        with self._lock:
            if reply.HasField("answer"):
                waiter = self._calls.pop(reply.answer.number, None)
            else:
                waiter = self._plain.popleft() if self._plain else None
        if waiter is not None:
            waiter.end(reply)

    def _end_all(self) -> None:
        """The connection has ended."""
        with self._lock:
            self.is_closed = True
            waiters: Iterable[_Waiter] = [*self._calls.values(), *self._plain]
            self._calls.clear()
            self._plain.clear()
        for waiter in waiters:
            waiter.end(None)


def check_same_server(memory: tuple[int, int], path: str, timeout: float) -> None:
    """Checks that the server on gRPC's socket is the one that takes shared memory: the same process or user.

    Args:
        memory: ``MemorySocket.peer``.
        path: of gRPC's socket.

    Raises:
        ServerUnavailableError: it is not.
        OSError: nothing listens on gRPC's socket.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout)
        connection.connect(path)
        server = wire.peer_of(connection)
    (process, user), (own_process, own_user) = memory, server
    if user != own_user and (process != own_process or not process):
        raise ServerUnavailableError(
            f"{path}: the server there is process {own_process} of user {own_user}, but process {process} of user "
            f"{user} listens for shared memory: got another user; expected the same. Keep sockets in a directory where "
            "nobody else can write"
        )


def _milliseconds(deadline: float) -> int:
    """How long to poll, at most.

    Raises:
        TimeoutError: the deadline has passed.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return math.ceil(1000 * min(left, _MOST_POLL_SECONDS))


def _lost(why: str) -> SocketError:
    return SocketError(grpc.StatusCode.UNAVAILABLE, f"shared memory: {why}")
