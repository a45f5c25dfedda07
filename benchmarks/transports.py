"""The peers of :mod:`data_plane` and its clients, each in a process of its own that is asked over a pipe.

Sockets and a bare gRPC server show what the same bytes cost without us; the clients are the same for both sides.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

import grpc
import torch
from workloads import Workload, regime_named

from lovasz.client import LossClient, LovaszSoftmax, remote
from lovasz.client.options import ClientOptions, Transport
from lovasz.spec import weighted_sum
from lovasz.wire.framing import UnaryRequest

HOST = "127.0.0.1"
ANSWER_SECONDS = 300.0
LEAVE_SECONDS = 10.0
TRITON_START_SECONDS = 120.0
TRITON_STOP_SECONDS = 45.0
ECHO_THREADS = 16
ECHO = "/benchmark.Echo/Echo"
COMPUTE = "/lovasz.v1.LossService/Compute"
OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)
"""Channels of one process to one target share a connection otherwise."""
OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), OWN_CONNECTION)

_SIZES = struct.Struct("<QQ")
"""Before each request on a socket: how many bytes come, and how many are wanted back."""


class Child:
    """A function in a process of its own: leave the ``with`` to end it."""

    def __init__(self, serve: Callable[..., None], *arguments: object) -> None:
        """
        Args:
            serve: gets its end of the pipe, and the arguments.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, self._its_end = context.Pipe()
        self._process = context.Process(target=_run, args=(serve, self._its_end, *arguments), daemon=True)

    def send(self, question: object) -> None:
        self._pipe.send(question)

    def receive(self) -> Any:
        """What it sends next.

        Raises:
            RuntimeError: it failed, or is silent for too long.
        """
        if not self._pipe.poll(ANSWER_SECONDS):
            raise RuntimeError(f"no answer within {ANSWER_SECONDS:g} s")
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError("its process has ended") from None
        if isinstance(answer, Exception):
            raise RuntimeError(f"in its process: {answer}")
        return answer

    def __enter__(self) -> Child:
        self._process.start()
        self._its_end.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()  # which ends it
        self._process.join(LEAVE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _run(serve: Callable[..., None], pipe: Connection, *arguments: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which then ends this process.
    try:
        serve(pipe, *arguments)
    except EOFError:
        pass
    except Exception as error:
        with suppress(OSError):  # The driver has gone.
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _until_closed(pipe: Connection) -> None:
    while True:
        pipe.recv()


@contextmanager
def own_connections() -> Iterator[None]:
    """Clients that are opened meanwhile have connections of their own, as trainers in processes of theirs do."""
    with mock.patch.object(remote, "_OPTIONS", (*remote._OPTIONS, OWN_CONNECTION)):
        yield


# --- Sockets ----------------------------------------------------------------------------------------------------------


def serve_sockets(pipe: Connection) -> None:
    """Receives bytes in place and sends as many back as wanted. Sends its port first."""
    listener = socket.create_server((HOST, 0))
    pipe.send(listener.getsockname()[1])

    def accept() -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_answer, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    _until_closed(pipe)


def _answer(connection: socket.socket) -> None:
    place, answer = bytearray(), bytearray()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection:
        try:
            while True:
                sizes = bytearray(_SIZES.size)
                _receive(connection, memoryview(sizes))
                incoming, wanted = _SIZES.unpack(sizes)
                if len(place) != incoming or len(answer) != wanted:  # once a connection
                    place, answer = bytearray(incoming), bytearray(b"\1") * wanted
                _receive(connection, memoryview(place))
                connection.sendall(answer)
        except OSError:
            return


def _receive(connection: socket.socket, place: memoryview) -> None:
    while place:
        count = connection.recv_into(place)
        if not count:
            raise ConnectionResetError
        place = place[count:]


class SocketPeer:
    """A connection to :func:`serve_sockets`, for requests and answers of one size."""

    def __init__(self, port: int, parts: Sequence[memoryview], answer_bytes: int) -> None:
        """
        Args:
            parts: what a call sends.
        """
        self._socket = socket.create_connection((HOST, port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._parts = (memoryview(_SIZES.pack(sum(part.nbytes for part in parts), answer_bytes)), *parts)
        self._place = bytearray(b"\1") * answer_bytes

    def __call__(self) -> None:
        for part in self._parts:
            self._socket.sendall(part)
        _receive(self._socket, memoryview(self._place))

    def close(self) -> None:
        self._socket.close()


# --- gRPC -------------------------------------------------------------------------------------------------------------


def serve_echo(pipe: Connection, answer_bytes: int) -> None:
    """A threaded gRPC server that answers each message with so many bytes. Sends its target first."""
    answer = bytes(answer_bytes)
    server = grpc.server(ThreadPoolExecutor(ECHO_THREADS), options=OPTIONS[:2])
    handler: Any = grpc.unary_unary_rpc_method_handler(lambda request, context: answer)
    _, service, method = ECHO.split("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port(f"{HOST}:0")
    server.start()
    pipe.send(f"{HOST}:{port}")
    try:
        _until_closed(pipe)
    finally:
        server.stop(0).wait()


def encoded(workload: Workload, regime: str) -> bytes:
    """A request as our client sends it in one message."""
    ((logits, labels),) = workload.inputs(regime_named(regime), torch.device("cpu"))
    target = remote.RemoteTarget(f"{HOST}:1", ClientOptions(transport=Transport.GRPC))  # connects to nobody
    try:
        call = target.prepare(logits, labels, weighted_sum(LovaszSoftmax()), want_grad=True, joint=None)
        return UnaryRequest(call.request.to_proto(), call.logits, call.labels).encode()
    finally:
        target.close()


def ask_raw(target: str, method: str, request: bytes) -> bytes:
    """One call with ready bytes."""
    with grpc.insecure_channel(target, options=OPTIONS) as channel:
        call: Any = channel.unary_unary(method)
        answer: bytes = call(request, timeout=ANSWER_SECONDS)
        return answer


def generate(pipe: Connection, workload: Workload, regime: str, threads: int) -> None:
    """Clients in threads, each with a connection of its own, which send as fast as they are answered.

    A question is (target, method, start, seconds): the method of a call with ready bytes, or "" for ``LossClient``;
    the instant of the start; for how long. The answer is how many calls were made, and the instant when the last ended.
    """
    ((logits, labels),) = workload.inputs(regime_named(regime), torch.device("cpu"))
    request = encoded(workload, regime)
    torch.set_num_threads(1)
    with ExitStack() as stack, own_connections():
        callers: dict[tuple[str, str], list[Callable[[], object]]] = {}

        def caller(target: str, method: str) -> Callable[[], object]:
            if not method:
                client = stack.enter_context(LossClient(target, transport="grpc"))
                return lambda: client.compute(logits, labels, LovaszSoftmax())
            call: Any = stack.enter_context(grpc.insecure_channel(target, options=OPTIONS)).unary_unary(method)
            return lambda: call(request, timeout=ANSWER_SECONDS)

        def send(call: Callable[[], object], start: float, seconds: float) -> tuple[int, float]:
            time.sleep(max(0.0, start - time.perf_counter()))
            count = 0
            while time.perf_counter() < start + seconds:
                call()
                count += 1
            return count, time.perf_counter()

        pool = stack.enter_context(ThreadPoolExecutor(threads))
        pipe.send("ready")
        while True:
            target, method, start, seconds = pipe.recv()
            if (target, method) not in callers:
                callers[target, method] = [caller(target, method) for _ in range(threads)]
            done = list(pool.map(partial(send, start=start, seconds=seconds), callers[target, method]))
            pipe.send((sum(count for count, _ in done), max(end for _, end in done)))


# --- Triton, and our client in the form of its client -----------------------------------------------------------------


def serve_clients(pipe: Connection) -> None:
    """Does with our server what :mod:`triton_client` does with Triton. Asked with the arguments of :func:`measured`."""
    torch.set_num_threads(1)
    pipe.send("ready")
    while True:
        pipe.send(measured(*pipe.recv()))


def measured(target: str, workload: Workload, regime: str, requests: int, untimed: int) -> dict[str, Any]:
    """As :func:`triton_client.measured`."""
    pairs = workload.inputs(regime_named(regime), torch.device("cpu"))
    arrays = [(logits.numpy(), labels.to(torch.uint8).numpy()) for logits, labels in pairs]
    start_line = threading.Barrier(len(pairs), timeout=ANSWER_SECONDS)

    def client(number: int) -> list[tuple[float, float]]:
        with LossClient(target, transport="grpc", timeout=ANSWER_SECONDS) as client:
            try:
                for _ in range(untimed):
                    client.compute(*arrays[number], LovaszSoftmax())
                start_line.wait()
            except BaseException:
                start_line.abort()
                raise
            calls = []
            for _ in range(requests):
                start = time.perf_counter()
                client.compute(*arrays[number], LovaszSoftmax())
                calls.append((start, time.perf_counter()))
            return calls

    with own_connections(), ThreadPoolExecutor(len(pairs)) as pool:
        calls = list(pool.map(client, range(len(pairs))))
    return {
        "latencies_s": [[end - start for start, end in own] for own in calls],
        "wall_s": max(own[-1][1] for own in calls) - min(own[0][0] for own in calls),
    }


@contextmanager
def triton_server(python: Path, instances: int, threads: int) -> Iterator[str]:
    """Starts :mod:`triton_server` with another Python and gives its target.

    Raises:
        RuntimeError: it did not come up; the text ends with what it said.
    """
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    script = str(Path(__file__).with_name("triton_server.py"))
    command = [str(python), script, "--port", str(port), "--instances", str(instances), "--threads", str(threads)]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        # A session of its own: whatever it leaves behind can be ended with it, and Ctrl-C is for the driver.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, start_new_session=True)
        try:
            assert process.stdout is not None
            came, _, _ = select.select([process.stdout], [], [], TRITON_START_SECONDS)
            if not came or not process.stdout.readline().startswith(b"READY"):
                log.seek(0)
                raise RuntimeError(f"Triton did not come up: {log.read()[-1000:]}")
            yield f"{HOST}:{port}"
        finally:
            process.terminate()
            try:
                process.wait(TRITON_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
