"""The client's end of the shared-memory socket, against a server whose packets the test writes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from lovasz import wire
from lovasz.client.errors import LossError, ServerUnavailableError
from lovasz.client.memory_socket import MemorySocket, SocketError, check_same_server
from lovasz.v1 import loss_pb2 as pb

TIMEOUT = 30.0
NOBODY = 65534
"""The user id of one who owns nothing."""


class Server:
    """One connection of a client, and the packets that came over it."""

    def __init__(self, listener: socket.socket) -> None:
        self.socket, _ = listener.accept()
        self.socket.settimeout(TIMEOUT)

    def receive(self) -> pb.SharedMemoryRequest:
        return pb.SharedMemoryRequest.FromString(self.socket.recv(1 << 17))

    def numbers(self, count: int) -> list[int]:
        """Those of the next calls."""
        return [self.receive().call.number for _ in range(count)]

    def answer(self, number: int) -> None:
        """Its loss is its number."""
        answer = pb.SharedMemoryAnswer(number=number, header=pb.ResponseHeader(loss=number))
        self.socket.send(pb.SharedMemoryReply(answer=answer).SerializeToString())

    def refuse(self, number: int, **error: object) -> None:
        answer = pb.SharedMemoryAnswer(number=number, error=pb.CallError(**error))  # type: ignore[arg-type]
        self.socket.send(pb.SharedMemoryReply(answer=answer).SerializeToString())

    def reply(self, error: str = "") -> None:
        self.socket.send(pb.SharedMemoryReply(session=b"name", error=error, takes_calls=True).SerializeToString())


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s.memory"))
        listener.listen()
        listener.settimeout(TIMEOUT)
        yield listener


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as threads:
        yield threads


@pytest.fixture
def ends(listener: socket.socket, threads: ThreadPoolExecutor) -> Iterator[tuple[MemorySocket, Server]]:
    accepted = threads.submit(Server, listener)
    made = threads.submit(MemorySocket, listener.getsockname(), TIMEOUT)
    server = accepted.result(TIMEOUT)
    server.reply()
    client = made.result(TIMEOUT)
    assert (client.hello.session, client.hello.takes_calls) == (b"name", True)
    yield client, server
    client.close()
    server.socket.close()


@pytest.fixture
def client(ends: tuple[MemorySocket, Server]) -> MemorySocket:
    return ends[0]


@pytest.fixture
def server(ends: tuple[MemorySocket, Server]) -> Server:
    return ends[1]


def packet(run: str = "") -> pb.SharedMemoryRequest:
    return pb.SharedMemoryRequest(call=pb.SharedMemoryCall(header=pb.RequestHeader(run=run)))


def call(client: MemorySocket, timeout: float = TIMEOUT, run: str = "") -> float:
    return client.call(packet(run), timeout).loss


def started(threads: ThreadPoolExecutor, client: MemorySocket, server: Server) -> tuple[Future[float], int]:
    """A call in a thread, and its number once the server has it."""
    future = threads.submit(call, client)
    return future, server.numbers(1)[0]


def code_of(future: Future[float]) -> grpc.StatusCode:
    with pytest.raises(SocketError) as failed:
        future.result(TIMEOUT)
    return failed.value.code()


def test_each_thread_gets_its_own_answer(client: MemorySocket, server: Server, threads: ThreadPoolExecutor) -> None:
    for _ in range(5):
        calls = [started(threads, client, server) for _ in range(16)]
        for _, number in reversed(calls):
            server.answer(number)
        for future, number in calls:
            assert future.result(TIMEOUT) == number


def test_packets_about_regions_are_replied_to_beside_calls(
    client: MemorySocket, server: Server, threads: ThreadPoolExecutor
) -> None:
    future, number = started(threads, client, server)
    asked = threads.submit(client.ask, pb.SharedMemoryRequest(region=5), (), TIMEOUT)
    assert server.receive().region == 5
    server.reply()
    assert asked.result(TIMEOUT) is None
    asked = threads.submit(client.ask, pb.SharedMemoryRequest(region=6), (), TIMEOUT)
    assert server.receive().region == 6
    server.reply("no room")
    with pytest.raises(LossError, match="shared memory: no room"):
        asked.result(TIMEOUT)
    server.answer(number)
    assert future.result(TIMEOUT) == number


def test_a_call_says_how_long_it_waits_and_its_metadata(
    client: MemorySocket, server: Server, threads: ThreadPoolExecutor
) -> None:
    message = packet("r")
    message.call.metadata["a"] = "b"
    future = threads.submit(client.call, message, 12.5)
    came = server.receive().call
    assert (came.timeout_seconds, came.header.run, dict(came.metadata)) == (12.5, "r", {"a": "b"})
    server.answer(came.number)
    assert future.result(TIMEOUT).loss == came.number


def test_an_error_is_like_one_of_grpc(client: MemorySocket, server: Server, threads: ThreadPoolExecutor) -> None:
    future, number = started(threads, client, server)
    server.refuse(number, code="RESOURCE_EXHAUSTED", text="full", retry_after_milliseconds=-1000)
    with pytest.raises(grpc.RpcError) as failed:
        future.result(TIMEOUT)
    error = failed.value
    assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
    assert error.trailing_metadata() == ((wire.PUSHBACK_KEY, "-1000"),)
    future, number = started(threads, client, server)
    server.refuse(number, code="NEW_IN_2040", text="?")
    assert code_of(future) is grpc.StatusCode.UNKNOWN


def test_a_timeout_cancels_the_call_and_its_late_answer_is_nobodys(client: MemorySocket, server: Server) -> None:
    with pytest.raises(SocketError) as failed:
        call(client, timeout=0.05)
    assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    number = server.receive().call.number
    assert server.receive().cancel == number
    server.answer(number)
    server.answer(number + 1)
    assert call(client) == number + 1


def test_a_late_reply_about_a_region_is_nobodys_and_calls_go_on(
    client: MemorySocket, server: Server, threads: ThreadPoolExecutor
) -> None:
    future, number = started(threads, client, server)
    with pytest.raises(TimeoutError):
        client.ask(pb.SharedMemoryRequest(region=1), (), 0.05)
    second = threads.submit(client.ask, pb.SharedMemoryRequest(region=2), (), TIMEOUT)
    assert [server.receive().region for _ in range(2)] == [1, 2]
    server.reply("no")
    server.reply()
    second.result(TIMEOUT)
    server.answer(number)
    assert future.result(TIMEOUT) == number


def test_when_the_thread_that_reads_gives_up_another_reads(
    client: MemorySocket, server: Server, threads: ThreadPoolExecutor
) -> None:
    """Each of these calls may be the one that reads."""
    early = [threads.submit(call, client, 0.2) for _ in range(4)]
    late = [threads.submit(call, client) for _ in range(4)]
    calls = [server.receive().call for _ in range(8)]
    assert {code_of(future) for future in early} == {grpc.StatusCode.DEADLINE_EXCEEDED}
    for one in calls:
        if one.timeout_seconds > 1:
            server.answer(one.number)
    assert all(future.result(TIMEOUT) for future in late)


def test_ctrl_c_in_the_thread_that_reads_ends_its_call_alone(
    client: MemorySocket, server: Server, threads: ThreadPoolExecutor
) -> None:
    def interrupt() -> tuple[int, Future[float], int]:
        number = server.numbers(1)[0]
        other = threads.submit(call, client)
        other_number = server.numbers(1)[0]
        os.kill(os.getpid(), signal.SIGINT)
        return number, other, other_number

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupted = threads.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            call(client)
    finally:
        signal.signal(signal.SIGINT, before)
    number, other, other_number = interrupted.result(TIMEOUT)
    assert server.receive().cancel == number
    server.answer(other_number)
    assert other.result(TIMEOUT) == other_number


@pytest.mark.parametrize("end", ["closed", "garbage", "client closed"])
def test_the_end_of_the_connection_ends_all_calls(
    client: MemorySocket, server: Server, threads: ThreadPoolExecutor, end: str
) -> None:
    calls = [started(threads, client, server)[0] for _ in range(4)]
    if end == "closed":
        server.socket.close()
    elif end == "garbage":
        server.socket.send(b"\xff\xff")
    else:
        client.close()
    assert {code_of(future) for future in calls} == {grpc.StatusCode.UNAVAILABLE}
    assert client.is_closed
    with pytest.raises(SocketError):
        call(client)
    with pytest.raises(OSError, match="the session has ended"):
        client.ask(pb.SharedMemoryRequest(region=1), (), TIMEOUT)


def test_a_server_that_does_not_read_costs_no_more_than_the_timeout(client: MemorySocket, server: Server) -> None:
    for _ in range(20):
        with pytest.raises(SocketError) as failed:
            call(client, timeout=0.05, run="x" * 50_000)
        assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "cancel" in {server.receive().WhichOneof("message") for _ in range(2)}


def test_a_session_that_is_refused(listener: socket.socket, threads: ThreadPoolExecutor) -> None:
    made = threads.submit(MemorySocket, listener.getsockname(), TIMEOUT)
    server = Server(listener)
    server.reply("256 processes share memory with this server")
    with pytest.raises(LossError, match="shared memory: 256 processes"):
        made.result(TIMEOUT)
    server.socket.close()


def test_no_time_is_left_to_connect(listener: socket.socket) -> None:
    with pytest.raises(TimeoutError):
        MemorySocket(listener.getsockname(), -0.001)


def test_a_server_that_says_nothing(listener: socket.socket) -> None:
    with pytest.raises(TimeoutError):
        MemorySocket(listener.getsockname(), timeout=0.05)


# --- Whose socket it is -------------------------------------------------------------------------------------------

STRANGER = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind("\\0" + sys.argv[1])
os.setuid(65534)
listener.listen()
print("listens", flush=True)
sys.stdin.read()
"""


def test_the_same_process_or_user_is_the_same_server(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        own = os.getpid(), os.getuid()
        check_same_server(own, str(tmp_path / "s"), TIMEOUT)
        check_same_server((1, own[1]), str(tmp_path / "s"), TIMEOUT)
        check_same_server((own[0], 12345), str(tmp_path / "s"), TIMEOUT)
        with pytest.raises(ServerUnavailableError, match=r"process 1 of user 12345 listens .*: got another user"):
            check_same_server((1, 12345), str(tmp_path / "s"), TIMEOUT)
        with pytest.raises(ServerUnavailableError):
            check_same_server((0, 12345), str(tmp_path / "s"), TIMEOUT)
    with pytest.raises(ConnectionRefusedError):
        check_same_server(own, str(tmp_path / "s"), TIMEOUT)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_the_process_and_the_user_of_who_listens_are_known() -> None:
    with contextlib.ExitStack() as stack:
        name = f"lovasz-test-{os.getpid()}"
        command = [sys.executable, "-c", STRANGER, name]
        stranger = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        assert stranger.stdout is not None
        assert stranger.stdin is not None
        assert stranger.stdout.readline() == "listens\n"
        connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        connection.connect(f"\0{name}")
        assert wire.peer_of(connection) == (stranger.pid, NOBODY)
        stranger.stdin.close()
