"""Processes on the server's host that share memory that is not there, too much of it, or something else."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from faults.conftest import ARGUMENTS, BUDGET_BYTES, MAX_REQUESTS, MAX_THREADS
from support.audit import Audit
from support.footprint import Footprint
from support.memory_caller import MemoryCaller, memfd, memory_path
from support.messages import header_of, tensors
from support.scrape import metric
from support.waiting import eventually

from lovasz import wire
from lovasz.client import LossClient
from lovasz.client.regions import Region
from lovasz.client.shared_memory import Session
from lovasz.server.launch import ServerProcess
from lovasz.server.transport.shared_memory import FIRST_REGION_SECONDS
from lovasz.spec import LovaszSoftmax
from lovasz.v1 import loss_pb2 as pb
from lovasz.v1 import loss_pb2_grpc

LIBC = ctypes.CDLL(None, use_errno=True)
KEEP_SIZE, PUNCH_HOLE = 1, 2
MAX_SHARED_BYTES = 2 * BUDGET_BYTES
PATIENCE_SECONDS = 15.0


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    path = tmp_path_factory.mktemp("sockets") / "s"
    listen = ["--listen", f"127.0.0.1:0,unix:{path}", "--shared-memory", "--max-shared-memory", f"{MAX_SHARED_BYTES}B"]
    with ServerProcess([*ARGUMENTS, *listen]) as server:
        yield server


@pytest.fixture(scope="module")
def at_rest(sharing: ServerProcess) -> Audit:
    return Audit(sharing, MAX_THREADS)


@pytest.fixture
def audit(at_rest: Audit) -> Iterator[Audit]:
    yield at_rest
    at_rest.check()


@pytest.fixture
def session(sharing: ServerProcess, audit: Audit) -> Iterator[Session]:
    session = Session(memory_path(sharing), PATIENCE_SECONDS)
    yield session
    session.close()


@pytest.fixture
def caller(sharing: ServerProcess, audit: Audit) -> Iterator[MemoryCaller]:
    caller = MemoryCaller(memory_path(sharing))
    yield caller
    caller.close()


def test_memory_that_is_not_there_is_refused(sharing: ServerProcess, caller: MemoryCaller) -> None:
    before = Footprint.of(sharing.pid).resident_bytes
    for number in range(1, 30):
        with memfd(BUDGET_BYTES // 2, sparse=True) as descriptor:
            assert "got a memfd with 0 of" in (caller.share(number, descriptor) or "")
    assert Footprint.of(sharing.pid).resident_bytes < before + BUDGET_BYTES // 4


@pytest.mark.parametrize("carrier", ["socket", "grpc"])
def test_memory_that_a_server_has_cannot_be_given_back(sharing: ServerProcess, session: Session, carrier: str) -> None:
    """Its pages would come back as the server's, once it touches them."""
    region, header = shared(session)
    pages = os.fstat(region.descriptor).st_blocks
    with asking(sharing, session, carrier) as ask:
        for _ in range(3):
            assert LIBC.fallocate(region.descriptor, KEEP_SIZE | PUNCH_HOLE, 0, ctypes.c_long(1 << 20)) == -1
            assert ctypes.get_errno() == errno.EPERM
            with pytest.raises(PermissionError):
                region.map.madvise(mmap.MADV_REMOVE)
            assert ask(header) == ""
    assert os.fstat(region.descriptor).st_blocks == pages
    region.close()


def shared(session: Session, *, joint: wire.Joint | None = None) -> tuple[Region, pb.RequestHeader]:
    """A region with tensors, and the header of a request for them."""
    logits, labels = tensors(300)
    header = header_of(logits, labels, joint=joint)
    place = wire.Request.from_proto(header).places
    region = Region(place.nbytes)
    session.share(region)
    at = wire.SharedTensors(session.name, region.number, place.logits, place.labels, place.grad)
    header.shared_tensors.CopyFrom(at.to_proto())
    region.map[place.logits : place.logits + logits.nbytes] = logits.tobytes()
    region.map[place.labels : place.labels + labels.nbytes] = labels.tobytes()
    return region, header


@contextlib.contextmanager
def asking(server: ServerProcess, session: Session, carrier: str) -> Iterator[Callable[[pb.RequestHeader], str]]:
    """Makes calls on the socket or over gRPC; they return the error, empty if there was none."""
    with grpc.insecure_channel(server.target) as channel:
        compute = loss_pb2_grpc.LossServiceStub(channel).Compute

        def ask(header: pb.RequestHeader) -> str:
            try:
                if carrier == "socket":
                    session.socket.call(
                        pb.SharedMemoryRequest(call=pb.SharedMemoryCall(header=header)), PATIENCE_SECONDS
                    )
                else:
                    compute(pb.ComputeRequest(header=header), timeout=PATIENCE_SECONDS)
            except grpc.RpcError as error:
                return f"{error.code().name}: {error.details()}"
            return ""

        yield ask


def test_no_region_is_larger_than_the_budget_nor_all_together_than_they_may(
    sharing: ServerProcess, session: Session, caller: MemoryCaller
) -> None:
    with memfd(1 << 42, sparse=True) as descriptor:
        assert "expected at most 67108864 (--memory-budget)" in (caller.share(1, descriptor) or "")
    regions = [Region(MAX_SHARED_BYTES // 4) for _ in range(4)]
    for region in regions:
        session.share(region)
    assert metric(sharing, "lovasz_shared_memory_bytes") == MAX_SHARED_BYTES
    with memfd() as descriptor:
        assert "(--max-shared-memory)" in (caller.share(1, descriptor) or "")
    for region in regions:
        region.close()


@pytest.mark.parametrize("others", [0, 252], ids=["alone", "as the last that fits beside a packet"])
def test_a_descriptor_that_lingers_holds_up_nobody(sharing: ServerProcess, caller: MemoryCaller, others: int) -> None:
    """To close the last descriptor of this socket takes a minute: its last bytes are sent first, and nobody reads."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        foreign = socket.create_connection(listener.getsockname())
        deaf, _ = listener.accept()
        foreign.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                foreign.send(bytes(1 << 16))
        foreign.setblocking(True)
        foreign.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
        packet = pb.SharedMemoryRequest(region=1).SerializeToString()
        os.kill(sharing.pid, signal.SIGSTOP)  # It shall receive the last descriptor.
        try:
            socket.send_fds(caller.socket, [packet], [*[deaf.fileno()] * others, foreign.fileno()])
            os.close(foreign.detach())
        finally:
            os.kill(sharing.pid, signal.SIGCONT)
        reply = caller.reply()
        assert reply is not None
        assert ("expected 1" if others else "expected a memfd") in reply.error
        with contextlib.closing(Session(memory_path(sharing), PATIENCE_SECONDS)) as other:
            region = Region(4096)
            other.share(region)
            region.close()
        deaf.close()


def test_silent_connections_end_and_make_room(sharing: ServerProcess, audit: Audit) -> None:
    with contextlib.ExitStack() as connections:
        for _ in range(250):
            connection = connections.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            connection.connect(memory_path(sharing))
        since = time.monotonic()
        assert eventually(lambda: metric(sharing, "lovasz_shared_memory_sessions") == 0)
        assert time.monotonic() - since < 3 * FIRST_REGION_SECONDS
        with LossClient(sharing.targets[1], transport="shm") as client:
            assert np.isfinite(client.compute(*tensors(16), LovaszSoftmax()).loss)


def test_a_server_that_had_no_descriptors_left_takes_sessions_again(sharing: ServerProcess, audit: Audit) -> None:
    """As after a flood of connections over TCP. No session ends that could make room."""
    limits = resource.prlimit(sharing.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(sharing.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with ThreadPoolExecutor(1) as thread:
            caller = thread.submit(MemoryCaller, memory_path(sharing))
            assert eventually(lambda: any(line["event"] == "a process cannot share memory" for line in sharing.log))
            resource.prlimit(sharing.pid, resource.RLIMIT_NOFILE, limits)
            assert caller.result().hello is not None
            caller.result().close()
    finally:
        resource.prlimit(sharing.pid, resource.RLIMIT_NOFILE, limits)


# --- Calls on the socket ------------------------------------------------------------------------------------------


def test_calls_that_wait_on_the_socket_leave_grpc_and_health_alone(
    sharing: ServerProcess, session: Session, audit: Audit
) -> None:
    """Each waits for a rank that does not come. There are more of them than threads for calls on sockets."""
    region, header = shared(session)
    with contextlib.ExitStack() as stack:
        for place in range(3):
            caller = MemoryCaller(memory_path(sharing))
            stack.callback(caller.close)
            for number in range(MAX_REQUESTS):
                joint = wire.Joint(f"{place}", number, 0, 2)
                header.joint.CopyFrom(joint.to_proto())
                caller.ask(number, header)
        assert eventually(lambda: metric(sharing, "lovasz_joint_ranks_waiting") >= MAX_REQUESTS // 4)
        for _ in range(5):
            audit.check_loss()
            audit.check_health()
        assert caller.answer().error.code == "RESOURCE_EXHAUSTED"
    region.close()


def test_a_flood_of_calls_on_the_socket_leaves_grpc_and_health_alone(sharing: ServerProcess, audit: Audit) -> None:
    """Calls that are refused at once, as fast as they are answered."""
    stop, calls = threading.Event(), MAX_REQUESTS // 2

    def flood() -> int:
        caller, answers = MemoryCaller(memory_path(sharing)), 0
        while not stop.is_set():
            for number in range(calls):
                caller.ask(number, pb.RequestHeader())
            answers += len([caller.answer().error.code for _ in range(calls)])
        caller.close()
        return answers

    with ThreadPoolExecutor(2) as attackers:
        floods = [attackers.submit(flood) for _ in range(2)]
        try:
            for _ in range(5):
                audit.check_loss()
                audit.check_health()
        finally:
            stop.set()
        assert all(answers.result() > calls for answers in floods)


def test_answers_that_nobody_reads_end_their_session_alone(
    sharing: ServerProcess, session: Session, audit: Audit
) -> None:
    region, header = shared(session)
    deaf = MemoryCaller(memory_path(sharing))
    with pytest.raises(OSError, match=r"Broken pipe|reset"):  # noqa: PT012 - at one of them
        for number in range(100_000):
            deaf.ask(number, header)
    deaf.close()
    assert eventually(lambda: metric(sharing, "lovasz_shared_memory_sessions") == 1)
    assert (
        session.socket.call(pb.SharedMemoryRequest(call=pb.SharedMemoryCall(header=header)), PATIENCE_SECONDS).loss > 0
    )
    region.close()
