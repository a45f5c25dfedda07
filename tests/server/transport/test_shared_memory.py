"""Memory that is shared: what is found in it, what is refused, and that nothing is left of a caller that has gone."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import pytest
from support.footprint import descriptors_of
from support.memory_caller import SEALS, TIMEOUT, MemoryCaller, memfd

from lovasz import wire
from lovasz.client.errors import LossError, ServerUnavailableError
from lovasz.client.memory_socket import SocketError
from lovasz.client.regions import Region
from lovasz.client.shared_memory import Session
from lovasz.client.shared_memory import SharedMemory as Client
from lovasz.server.errors import SessionLostError
from lovasz.server.transport import regions, shared_memory
from lovasz.server.transport.regions import Closer
from lovasz.server.transport.shared_memory import SharedMemory
from lovasz.spec import InvalidInput, LovaszSoftmax, weighted_sum
from lovasz.v1 import loss_pb2 as pb

MEMFD = "lovasz-test"
LIBC, KEEP_SIZE, PUNCH_HOLE = ctypes.CDLL(None, use_errno=True), 1, 2
MIB = 1 << 20

HEADER = wire.Request.checked(
    weighted_sum(LovaszSoftmax()),
    wire.TensorSpec(wire.dtype_named("float32"), (1, 3, 10)),
    wire.TensorSpec(wire.dtype_named("uint8"), (1, 10)),
    want_grad=True,
)
LOGITS_BYTES, LABELS_BYTES = 120, 10


def eventually(condition: Callable[[], bool]) -> bool:
    for _ in range(int(TIMEOUT / 0.01)):
        if condition():
            return True
        time.sleep(0.01)
    return False


def serve(path: Path) -> SharedMemory:
    server = SharedMemory(str(path), max_region_bytes=8 * MIB, max_bytes=16 * MIB)
    server.start()
    return server


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / f"s{wire.MEMORY_SUFFIX}"


@pytest.fixture
def client(path: Path) -> Iterator[Client]:
    """A client of the server at the path; what stands in for gRPC's socket is of this process, too."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path).removesuffix(wire.MEMORY_SUFFIX))
        listener.listen()
        client = Client(
            str(path).removesuffix(wire.MEMORY_SUFFIX), cast(Any, SimpleNamespace(info=lambda seconds: None))
        )
        yield client
        client.close()


@pytest.fixture
def server(path: Path) -> Iterator[SharedMemory]:
    server = serve(path)
    yield server
    server.stop()
    assert (server.sessions, server.nbytes) == (0, 0)


@pytest.fixture
def session(server: SharedMemory) -> Iterator[Session]:
    session = Session(server.path, TIMEOUT)
    yield session
    session.close()


@contextlib.contextmanager
def region_of(nbytes: int = 4096) -> Iterator[Region]:
    region = Region(nbytes)
    yield region
    region.close()


def request(
    session: bytes, region: int, offsets: tuple[int, int, int] = (0, 128, 192), *, want_grad: bool = True
) -> wire.Request:
    shared = wire.SharedTensors(session, region, *offsets)
    return wire.Request.checked(HEADER.loss, HEADER.logits, HEADER.labels, want_grad, shared)


def mappings(name: str) -> int:
    return Path("/proc/self/maps").read_text(encoding="ascii").count(f"/memfd:{name} ")


@pytest.fixture
def caller(server: SharedMemory) -> Iterator[MemoryCaller]:
    caller = MemoryCaller(server.path)
    yield caller
    caller.close()


# --- What is shared -----------------------------------------------------------------------------------------------


def test_tensors_are_found_and_writes_are_seen_on_both_sides(server: SharedMemory, session: Session) -> None:
    logits_at, labels_at, grad_at, nbytes = HEADER.places
    with region_of(nbytes) as region:
        region.map[logits_at : logits_at + LOGITS_BYTES] = b"L" * LOGITS_BYTES
        session.share(region)
        assert server.nbytes == nbytes
        logits, labels, grad = server.tensors(
            request(session.name, region.number, offsets=(logits_at, labels_at, grad_at))
        )
        assert (logits.nbytes, labels.nbytes, grad.nbytes) == (LOGITS_BYTES, LABELS_BYTES, LOGITS_BYTES)
        assert logits == b"L" * LOGITS_BYTES
        region.map[labels_at : labels_at + LABELS_BYTES] = b"l" * LABELS_BYTES
        assert labels == b"l" * LABELS_BYTES
        grad[:] = b"G" * LOGITS_BYTES
        assert region.map[grad_at : grad_at + LOGITS_BYTES] == b"G" * LOGITS_BYTES


def test_no_gradient_takes_no_room(server: SharedMemory, session: Session) -> None:
    with region_of(192) as region:
        session.share(region)
        _, _, grad = server.tensors(request(session.name, region.number, want_grad=False))
        assert grad.nbytes == 0


def test_a_region_is_shared_once_and_found_until_it_is_taken_back(server: SharedMemory, session: Session) -> None:
    with region_of(4096) as one, region_of(8192) as other:
        session.share(one)
        session.share(other)
        session.share(one)
        assert server.nbytes == 4096 + 8192
        number = one.number
        session.release(one)
        assert eventually(lambda: server.nbytes == 8192)
        with pytest.raises(InvalidInput, match=rf"shared_tensors\.region: got {number}; expected the number of a reg"):
            server.tensors(request(session.name, number))
        session.share(one)
        assert one.number != number
        assert server.tensors(request(session.name, one.number))
    assert eventually(lambda: server.nbytes == 0)  # Regions that are closed are taken back.


def test_a_region_that_is_taken_too_late_is_taken_back_and_others_go_on(server: SharedMemory, session: Session) -> None:
    with region_of() as other:
        session.share(other)
        with region_of(8192) as region:
            with server._sharing, pytest.raises(SocketError) as late:
                session.share(region, timeout=0.01)
            assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert eventually(lambda: server.nbytes == 4096)
        assert server.tensors(request(session.name, other.number))


def test_to_take_back_what_is_not_shared_is_no_error(server: SharedMemory, caller: MemoryCaller) -> None:
    assert caller.release(5) == ""
    assert server.sessions == 1


@pytest.mark.parametrize("number", [-(2**63), -1, 0, 1, 2**63 - 1])
def test_a_region_has_the_number_that_its_caller_gives_it(
    server: SharedMemory, caller: MemoryCaller, number: int
) -> None:
    assert caller.hello is not None
    with memfd() as descriptor:
        assert caller.share(number, descriptor) == ""
    assert server.tensors(request(caller.hello.session, number))
    assert caller.release(number) == ""


def test_a_region_of_another_session_is_not_found(server: SharedMemory, session: Session, caller: MemoryCaller) -> None:
    assert caller.hello is not None
    assert caller.hello.session != session.name
    with region_of() as region:
        session.share(region)
        with pytest.raises(InvalidInput, match=r"shared_tensors\.region"):
            server.tensors(request(caller.hello.session, region.number))
    with pytest.raises(SessionLostError, match="has ended, or belongs to another server"):
        server.tensors(request(b"guessed", 1))


@pytest.mark.parametrize("place", [0, 1, 2], ids=["logits", "labels", "grad"])
@pytest.mark.parametrize("offset", [-1, -(2**63), 4096 - 9, 4096, 2**31, 2**32, 2**62, 2**63 - 1])
def test_a_tensor_that_is_not_within_its_region_is_refused(
    server: SharedMemory, session: Session, place: int, offset: int
) -> None:
    offsets = [0, 128, 192]
    offsets[place] = offset
    name = ("logits", "labels", "grad")[place]
    with region_of() as region:
        session.share(region)
        with pytest.raises(InvalidInput, match=rf"shared_tensors\.{name}_offset: got {offset} for \d+ bytes in a reg"):
            server.tensors(request(session.name, region.number, offsets=tuple(offsets)))


def test_a_tensor_may_end_where_its_region_does(server: SharedMemory, session: Session) -> None:
    with region_of() as region:
        session.share(region)
        offsets = (4096 - LOGITS_BYTES, 4096 - LABELS_BYTES, 4096 - LOGITS_BYTES)
        assert server.tensors(request(session.name, region.number, offsets=offsets))


def test_tensors_larger_than_any_region_are_refused(server: SharedMemory, session: Session) -> None:
    shape = (2**29, 4, 2**29)
    with region_of() as region:
        session.share(region)
        huge = wire.Request.checked(
            HEADER.loss,
            wire.TensorSpec(wire.dtype_named("float32"), shape),
            wire.TensorSpec(wire.dtype_named("uint8"), (2**29, 2**29)),
            True,
            wire.SharedTensors(session.name, region.number, 0, 0, 0),
        )
        with pytest.raises(InvalidInput, match=r"shared_tensors\.logits_offset: got 0 for \d+ bytes"):
            server.tensors(huge)


# --- What is refused ----------------------------------------------------------------------------------------------


def refused(server: SharedMemory, caller: MemoryCaller, error: str | None, text: str) -> None:
    """That the caller is told why, that nothing is kept, and that the session goes on."""
    assert error is not None
    assert text in error
    assert server.nbytes == 0
    with memfd() as descriptor:
        assert caller.share(77, descriptor) == ""


def test_no_descriptor(server: SharedMemory, caller: MemoryCaller) -> None:
    refused(server, caller, caller.share(1), "region: got 0 file descriptors beside it; expected 1")


@pytest.mark.parametrize("count", [2, 20, 253])
def test_several_descriptors(server: SharedMemory, caller: MemoryCaller, count: int) -> None:
    with memfd() as descriptor:
        error = caller.share(1, *[descriptor] * count)
        refused(server, caller, error, f"region: got {count} file descriptors")
    assert caller.release(77) == ""
    assert descriptors_of(MEMFD) == 0


def test_a_regular_file(server: SharedMemory, caller: MemoryCaller, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file:
        file.write(bytes(4096))
        file.flush()
        error = caller.share(1, file.fileno())
    refused(server, caller, error, "region: got a file descriptor of another kind; expected a memfd")


def test_a_socket(server: SharedMemory, caller: MemoryCaller) -> None:
    with socket.socket() as other:
        error = caller.share(1, other.fileno())
    refused(server, caller, error, "region: got a file descriptor of another kind; expected a memfd")


@pytest.mark.parametrize(
    "seals", [0, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SHRINK], ids=["no seal", "may shrink", "may grow"]
)
def test_memory_that_can_change_its_size(server: SharedMemory, caller: MemoryCaller, seals: int) -> None:
    with memfd(seals=seals) as descriptor:
        error = caller.share(1, descriptor)
    refused(server, caller, error, "region: got a memfd that can change its size; expected one sealed")


def test_memory_that_cannot_be_written(server: SharedMemory, caller: MemoryCaller) -> None:
    with memfd(seals=SEALS | fcntl.F_SEAL_WRITE) as descriptor:
        error = caller.share(1, descriptor)
    refused(server, caller, error, "Operation not permitted")


def test_memory_of_huge_pages(server: SharedMemory, caller: MemoryCaller) -> None:
    """Its owner can free a page during a call. If the system has no other, the server would end by SIGBUS."""
    with memfd(16 * MIB, sparse=True, flags=os.MFD_HUGETLB) as descriptor:
        error = caller.share(1, descriptor)
    refused(server, caller, error, "region: got a memfd of pages of")


def test_memory_of_no_bytes(server: SharedMemory, caller: MemoryCaller) -> None:
    with memfd(0) as descriptor:
        error = caller.share(1, descriptor)
    refused(server, caller, error, "region: got an empty memfd; expected at least one byte")


def test_a_number_that_is_in_use(server: SharedMemory, caller: MemoryCaller) -> None:
    assert caller.hello is not None
    with memfd(4096) as one, memfd(8192) as other:
        assert caller.share(1, one) == ""
        assert "got 1, which is shared already; expected another number" in (caller.share(1, other) or "")
    assert server.nbytes == 4096
    assert server.tensors(request(caller.hello.session, 1))


@pytest.mark.parametrize("packet", [b"\xff", b"\x08", b"\xff" * 1024, b"\xff" * 5000], ids=len)
def test_a_packet_that_is_no_message(server: SharedMemory, caller: MemoryCaller, packet: bytes) -> None:
    with memfd() as descriptor:
        refused(server, caller, caller.say(packet, descriptor), "")
    assert caller.release(77) == ""
    assert descriptors_of(MEMFD) == 0


def test_more_regions_than_a_session_may_have(
    server: SharedMemory, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "MAX_REGIONS", 2)
    with region_of() as one, region_of() as two, region_of() as three:
        session.share(one)
        session.share(two)
        with pytest.raises(LossError, match="2 regions are shared, the maximum"):
            session.share(three)
        assert three.session is None
        session.release(one)
        session.share(three)


def test_more_regions_than_all_sessions_may_have(
    server: SharedMemory, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_max_all_regions", 1)
    monkeypatch.setattr(shared_memory, "MAX_SESSIONS_OF_USER", 2 * shared_memory.MAX_SESSIONS)
    other = Session(server.path, TIMEOUT)
    with contextlib.closing(other), region_of() as one, region_of() as two:
        session.share(one)
        with pytest.raises(LossError, match="1 regions are shared by all processes, with the server's limit"):
            other.share(two)
        session.release(one)
        session.settle()
        other.share(two)


def test_more_regions_than_a_user_may_have(
    server: SharedMemory, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others have some left."""
    monkeypatch.setattr(server, "_max_all_regions", 3)
    other = Session(server.path, TIMEOUT)
    with contextlib.closing(other), region_of() as one, region_of() as two, region_of() as three:
        session.share(one)
        other.share(two)
        with pytest.raises(LossError, match="2 regions are shared by one user, with the server's limit of open files"):
            other.share(three)


def test_more_sessions_than_may_be(server: SharedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "MAX_SESSIONS", 2)
    first, second = Session(server.path, TIMEOUT), Session(server.path, TIMEOUT)
    with pytest.raises(LossError, match="2 processes share memory with this server, the maximum"):
        Session(server.path, TIMEOUT)
    first.close()
    assert eventually(lambda: server.sessions == 1)
    third = Session(server.path, TIMEOUT)
    with region_of() as region:
        third.share(region)
        assert server.nbytes == 4096
    second.close()
    third.close()


def test_more_sessions_than_a_user_may_have(server: SharedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "MAX_SESSIONS_OF_USER", 1)
    first = Session(server.path, TIMEOUT)
    with pytest.raises(LossError, match="1 processes of one user share memory with this server, the maximum"):
        Session(server.path, TIMEOUT)
    first.close()
    assert eventually(lambda: server.sessions == 0)


def test_memory_that_is_given_back_later_is_not_used(
    server: SharedMemory, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux before 5.1 cannot keep it from being given back."""
    monkeypatch.setattr(regions, "_SEAL_FUTURE_WRITE", 1 << 20)
    with region_of(8192) as region:
        session.share(region)
        ask = request(session.name, region.number)
        assert server.tensors(ask).logits.nbytes == LOGITS_BYTES
        assert LIBC.fallocate(region.descriptor, KEEP_SIZE | PUNCH_HOLE, 0, ctypes.c_long(4096)) == 0
        with pytest.raises(InvalidInput, match=r"region: got a memfd with 4096 of 8192 bytes allocated; expected all"):
            server.tensors(ask)


def test_a_memfd_is_shared_once(server: SharedMemory, caller: MemoryCaller) -> None:
    with memfd() as descriptor:
        assert caller.share(1, descriptor) == ""
        error = caller.share(2, descriptor)
        assert error == "region: got a memfd that was shared with a server before; expected a new one"
    with memfd(seals=SEALS | fcntl.F_SEAL_SEAL) as descriptor:
        error = caller.share(3, descriptor)
    assert error == "region: got a memfd sealed with F_SEAL_SEAL; expected one without"


def test_a_region_is_shared_with_one_server_after_the_other(path: Path, client: Client) -> None:
    """Its memory is replaced, and keeps its contents."""
    region = client.take(100_000)
    assert region is not None
    region.map[:5] = b"first"
    descriptors = []
    for _ in range(3):
        server = serve(path)
        try:
            session = client.share(region, TIMEOUT)
            assert client.share(region, TIMEOUT) is session
            assert server.nbytes == region.nbytes
            assert region.map[:5] == b"first"
            descriptors.append(os.fstat(region.descriptor).st_ino)
            session.close()  # As a call does that gets no answer.
        finally:
            server.stop()
    assert len(set(descriptors)) == 3
    region.close()


def test_memory_beyond_its_end_does_not_make_up_for_holes(server: SharedMemory, caller: MemoryCaller) -> None:
    """KEEP_SIZE allocates pages that no mapping reaches."""
    with memfd(8192, seals=0) as descriptor:
        assert LIBC.fallocate(descriptor, KEEP_SIZE, ctypes.c_long(8192), ctypes.c_long(4 * MIB)) == 0
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        error = caller.share(1, descriptor)
    refused(server, caller, error, "region: got a memfd with pages beyond its end")


def test_a_descriptor_that_cannot_be_closed_keeps_no_other_open() -> None:
    """As of a file whose system fails. This one is not there at all."""
    closer, (reader, writer) = Closer(), os.pipe()
    closer.close(1 << 20)
    closer.close(reader)
    assert eventually(lambda: not Path(f"/proc/self/fd/{reader}").exists())
    os.close(writer)


# --- What is left -------------------------------------------------------------------------------------------------


def test_of_a_session_that_has_ended_nothing_is_left(server: SharedMemory, caller: MemoryCaller) -> None:
    assert caller.hello is not None
    for number in range(1, 6):
        with memfd() as descriptor:
            assert caller.share(number, descriptor) == ""
    assert mappings(MEMFD) == 5
    caller.close()
    assert eventually(lambda: server.sessions == 0)
    assert eventually(lambda: (descriptors_of(MEMFD), mappings(MEMFD)) == (0, 0))
    assert server.nbytes == 0
    with pytest.raises(SessionLostError):
        server.tensors(request(caller.hello.session, 1))


def test_what_a_request_uses_stays_until_it_is_done(server: SharedMemory, caller: MemoryCaller) -> None:
    assert caller.hello is not None
    with memfd() as descriptor:
        os.pwrite(descriptor, b"x" * 4096, 0)
        assert caller.share(1, descriptor) == ""
    logits, labels, grad = server.tensors(request(caller.hello.session, 1))
    caller.close()
    assert eventually(lambda: server.sessions == 0)
    assert logits == b"x" * LOGITS_BYTES
    grad[:] = logits
    assert mappings(MEMFD) == 1
    assert server.nbytes == 4096, "memory that is still used counts"
    del logits, labels, grad
    gc.collect()
    assert (descriptors_of(MEMFD), mappings(MEMFD)) == (0, 0)
    assert server.nbytes == 0


def test_what_is_taken_back_is_given_back(server: SharedMemory, caller: MemoryCaller) -> None:
    for _ in range(3):
        with memfd() as descriptor:
            assert caller.share(1, descriptor) == ""
        assert caller.release(1) == ""
    assert (descriptors_of(MEMFD), mappings(MEMFD)) == (0, 0)


VANISHING = """
import sys, time
from lovasz.client.regions import Region
from lovasz.client.shared_memory import Session

session = Session(sys.argv[1], 60)
region = Region(4096)
session.share(region)
print("shared", flush=True)
time.sleep(60)
"""


def test_of_a_process_that_was_killed_nothing_is_left(server: SharedMemory) -> None:
    command = [sys.executable, "-c", VANISHING, server.path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "shared\n"
        assert (server.sessions, server.nbytes) == (1, 4096)
        process.send_signal(signal.SIGKILL)
    assert eventually(lambda: server.sessions == 0)
    assert eventually(lambda: (descriptors_of("lovasz"), mappings("lovasz")) == (0, 0))


def test_a_caller_cannot_shrink_what_it_has_shared(server: SharedMemory, session: Session) -> None:
    with region_of() as region:
        session.share(region)
        for size in (0, 4095, 8192):
            with pytest.raises(PermissionError):
                os.ftruncate(region.descriptor, size)
        logits, _, _ = server.tensors(request(session.name, region.number))
        assert bytes(logits) == bytes(LOGITS_BYTES)


def test_a_caller_that_takes_no_answers_is_let_go_and_the_others_are_served(
    server: SharedMemory, session: Session
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as deaf:
        deaf.connect(server.path)
        deaf.settimeout(TIMEOUT)
        packet = pb.SharedMemoryRequest(region=1, release=True).SerializeToString()
        with pytest.raises(OSError, match=r"Broken pipe|reset"):  # noqa: PT012 - at one of them
            for _ in range(100_000):
                deaf.send(packet)
    assert eventually(lambda: server.sessions == 1)
    with region_of() as region:
        session.share(region)
        assert server.nbytes == 4096


# --- The socket ---------------------------------------------------------------------------------------------------


def test_stop_ends_the_sessions_and_removes_the_socket(path: Path) -> None:
    server = serve(path)
    session, region = Session(server.path, TIMEOUT), Region(4096)
    session.share(region)
    server.stop()
    server.stop()
    assert not path.exists()
    assert (server.sessions, server.nbytes) == (0, 0)
    assert not server._thread.is_alive()
    region.session = None
    with pytest.raises(ServerUnavailableError, match="shared memory: "):
        session.share(region)
    with pytest.raises(ServerUnavailableError, match=r"no shared memory: No such file .*--shared-memory"):
        Session(server.path, TIMEOUT)
    region.close()
    session.close()


def test_the_socket_of_a_server_that_was_killed_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
        stale.bind(str(path))
    assert path.exists()
    with pytest.raises(ServerUnavailableError, match="Connection refused"):
        Session(str(path), TIMEOUT)
    server = serve(path)
    Session(server.path, TIMEOUT).close()
    server.stop()


def test_a_client_begins_a_new_session_when_its_server_was_started_again(path: Path, client: Client) -> None:
    server = serve(path)
    region = client.take(4096)
    session = client.share(region, TIMEOUT)
    assert client.share(region, TIMEOUT) is session
    server.stop()
    server = serve(path)
    with pytest.raises(SessionLostError):
        server.tensors(request(session.name, region.number))
    session.close()
    renamed = client.share(region, TIMEOUT)
    assert renamed.name != session.name
    assert server.tensors(request(renamed.name, region.number))
    client.regions.give(region)
    client.close()
    assert eventually(lambda: server.sessions == 0)
    server.stop()


def test_a_client_whose_server_went_away_unnoticed_can_try_again(path: Path, client: Client) -> None:
    server = serve(path)
    one, other = Region(4096), Region(4096)
    client.share(one, TIMEOUT)
    server.stop()
    with pytest.raises(ServerUnavailableError):
        client.share(other, TIMEOUT)
    server = serve(path)
    client.share(other, TIMEOUT)
    assert server.nbytes == 4096
    for region in (one, other):
        region.close()
    client.close()
    server.stop()
