"""A device that fails, and a system that refuses threads: nothing is answered wrongly, callers are told, and the
process ends for its supervisor."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np
import pytest
from faults.conftest import ARGUMENTS, MAX_REQUESTS, MAX_THREADS
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.audit import Audit
from support.faulty_server import POISON, FaultyServer
from support.footprint import Footprint
from support.messages import LOSS, request_of, tensors
from support.waiting import eventually

from lovasz.client import InvalidInputError, LossClient
from lovasz.core import compute
from lovasz.v1 import loss_pb2_grpc

STALL = ["--device-stall", "2", "--health-interval", "0.5"]
SIDES = range(20, 20 + 12)
LEAST_STACK = 2 << 20
"""Bytes of a thread's stack where the system sets no limit (pthread_create(3), x86-64)."""


@pytest.fixture
def stub(request: pytest.FixtureRequest) -> Iterator[tuple[FaultyServer, loss_pb2_grpc.LossServiceStub]]:
    """A server with the fault that the test is parametrized with, and calls to it that gRPC does not repeat."""
    with FaultyServer(request.param, [*ARGUMENTS, *STALL]) as server, grpc.insecure_channel(server.target) as channel:
        yield server, loss_pb2_grpc.LossServiceStub(channel)


@pytest.mark.parametrize("stub", ["memory"], indirect=True)
def test_batches_for_which_there_is_no_memory_are_split_and_no_thread_has_to_start(
    stub: tuple[FaultyServer, loss_pb2_grpc.LossServiceStub],
) -> None:
    server, service = stub
    assert service.Compute(request_of(*tensors(8)), timeout=60).header.loss > 0  # The audit counts its connection.
    audit = Audit(server, MAX_THREADS)
    inputs = [tensors(side) for side in SIDES]

    def answers_are_right() -> bool:
        calls = [service.Compute.future(request_of(*one), timeout=60) for one in inputs]
        for one, call in zip(inputs, calls, strict=True):
            known = compute(*one, LOSS)
            assert call.result().header.loss == known.loss
            assert call.result().grad == np.asarray(known.grad).tobytes()
        return any("computing it in halves" in str(line["event"]) for line in server.log)

    # For some seconds, small requests are computed one by one, as the audit's connection has sent some, too.
    assert eventually(answers_are_right)

    def codes_of_many() -> set[grpc.StatusCode]:
        calls = [service.Compute.future(request_of(*tensors(20)), timeout=60) for _ in range(MAX_REQUESTS)]
        return {call.code() for call in calls}

    # And threads that the system refuses are not needed: there is room for small memory, but not for a thread's stack.
    for _ in range(3):  # The C library takes memory for each thread that asks for some at the same time as others.
        assert codes_of_many() == {grpc.StatusCode.OK}
    limits = resource.prlimit(server.pid, resource.RLIMIT_AS)
    stack_bytes, _ = resource.prlimit(server.pid, resource.RLIMIT_STACK)
    room = (stack_bytes if stack_bytes != resource.RLIM_INFINITY else LEAST_STACK) * 7 // 8
    resource.prlimit(server.pid, resource.RLIMIT_AS, (Footprint.of(server.pid).address_bytes + room, limits[1]))
    assert codes_of_many() == {grpc.StatusCode.OK}
    audit.check_health()
    resource.prlimit(server.pid, resource.RLIMIT_AS, limits)
    audit.check()


@pytest.mark.parametrize(
    ("stub", "side"), [("hang", 150), ("hang", 20), ("lost", 20)], indirect=["stub"], ids=["hang", "hang_small", "lost"]
)
def test_a_device_that_fails_is_said_to_and_the_process_ends(
    stub: tuple[FaultyServer, loss_pb2_grpc.LossServiceStub], side: int
) -> None:
    """A small request may hang in its call's own thread: its caller is told when the process ends."""
    server, service = stub
    logits, labels = tensors(20)
    poison = tensors(side, POISON)
    known = compute(logits, labels, LOSS)
    assert service.Compute(request_of(logits, labels), timeout=60).header.loss == known.loss
    calls = [service.Compute.future(request_of(*poison), timeout=60)]
    calls += [service.Compute.future(request_of(logits, labels), timeout=60) for _ in range(8)]
    with grpc.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert eventually(
            lambda: (
                health.Check(health_pb2.HealthCheckRequest(), timeout=30).status
                == health_pb2.HealthCheckResponse.NOT_SERVING
            )
        )
    calls.append(service.Compute.future(request_of(logits, labels), timeout=60))
    for call in calls:
        if call.code() is grpc.StatusCode.OK:  # It was computed before.
            assert call.result().header.loss == known.loss
        else:
            assert call.code() is grpc.StatusCode.UNAVAILABLE, call.details()
    assert calls[0].code() is calls[-1].code() is grpc.StatusCode.UNAVAILABLE
    assert server.wait() == 3
    assert any(line["event"] == "the server cannot go on: stopping" for line in server.log)


@pytest.mark.parametrize("stub", ["check"], indirect=True)
def test_an_idle_device_that_hangs_in_its_check_is_said_to_and_the_process_ends(
    stub: tuple[FaultyServer, loss_pb2_grpc.LossServiceStub],
) -> None:
    server, service = stub
    assert service.Compute(request_of(*tensors(20, POISON)), timeout=60).header.loss > 0
    with grpc.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert eventually(
            lambda: (
                health.Check(health_pb2.HealthCheckRequest(), timeout=30).status
                == health_pb2.HealthCheckResponse.NOT_SERVING
            )
        )
    call = service.Compute.future(request_of(*tensors(20)), timeout=60)
    assert call.code() is grpc.StatusCode.UNAVAILABLE, call.details()
    assert server.wait() == 3
    assert any(line["event"] == "the server cannot go on: stopping" for line in server.log)


@pytest.mark.parametrize("stub", ["gRPC"], indirect=True)
def test_a_server_whose_grpc_is_dead_ends(stub: tuple[FaultyServer, loss_pb2_grpc.LossServiceStub]) -> None:
    server, service = stub
    assert service.Compute(request_of(*tensors(20, POISON)), timeout=60).header.loss > 0
    service.Compute.future(request_of(*tensors(20)), timeout=1).code()  # gRPC's thread dies of it.
    assert server.wait() == 3
    assert any(line.get("reason") == "gRPC does not answer" for line in server.log)


def test_a_server_that_cannot_start_all_threads_says_so_and_ends() -> None:
    server = FaultyServer("threads", ARGUMENTS)
    with pytest.raises(RuntimeError, match="is there a limit of processes, threads or address space"), server:
        pass
    assert server.wait() == 2


def test_a_stop_that_hangs_is_ended_by_the_system() -> None:
    code = """
import threading
from lovasz.server.__main__ import _end_in
for _ in range(150):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
def it_hangs_here():
    threading.Event().wait()
_end_in(0.1)
it_hangs_here()
"""
    ended = subprocess.run([sys.executable, "-c", code], timeout=60, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert "in it_hangs_here" in ended.stderr
    assert ended.stderr.count("Thread 0x") >= 100


def test_a_stop_that_hangs_is_ended_even_if_nothing_can_be_written() -> None:
    code = (
        "import faulthandler, threading; from lovasz.server.__main__ import _end_in; _end_in(0.1);"
        "faulthandler.cancel_dump_traceback_later(); threading.Event().wait()"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -signal.SIGALRM


def test_a_standard_error_that_nobody_reads_holds_up_nobody(tmp_path: Path) -> None:
    """A pipe whose reader hangs, and which is full."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"\n")
    os.set_blocking(writer, True)
    target = f"unix:{tmp_path}/socket"
    addresses = ["--listen", target, "--metrics-listen", "127.0.0.1:0"]
    process = subprocess.Popen([sys.executable, "-m", "lovasz.server", *ARGUMENTS, *addresses], stderr=writer)
    os.close(writer)
    try:
        with LossClient(target, timeout=60) as client:
            logits, labels = tensors(8)
            assert eventually(Path(tmp_path, "socket").exists)  # For a server that never was, a call waits ten seconds.
            with pytest.raises(InvalidInputError):  # The log says so.
                client.compute(logits, labels + 100, LOSS)
            assert client.compute(logits, labels, LOSS).loss == compute(logits, labels, LOSS).loss
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(reader)
