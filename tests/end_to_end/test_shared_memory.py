"""Shared memory between a client and a real server: the same answers, and every way in which it can go wrong."""

from __future__ import annotations

import errno
import gc
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from support.footprint import Footprint
from support.fork_server import ForkedServer
from support.late_socket import late_socket
from support.scrape import metric
from support.torch_tensors import tensors
from support.vector_cases import Case, load
from support.waiting import eventually

from lovasz import wire
from lovasz.client import (
    CallCancelledError,
    CrossEntropy,
    DeadlineExceededError,
    Joint,
    LossClient,
    LossError,
    LovaszSoftmax,
    ServerOverloadedError,
    ServerUnavailableError,
    cli,
)
from lovasz.client import remote as client_remote
from lovasz.client.options import ClientOptions, Transport
from lovasz.client.regions import Region
from lovasz.client.remote import RemoteTarget
from lovasz.client.shared_memory import Session
from lovasz.client.torch import RemoteLoss
from lovasz.core import compute
from lovasz.server.launch import ServerProcess
from lovasz.spec import LossLike, weighted_sum
from lovasz.v1 import loss_pb2 as pb
from lovasz.wire import framing

SOFTMAX = LovaszSoftmax()


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server on a Unix socket and on TCP that takes shared memory."""
    path = tmp_path_factory.mktemp("sharing") / "s"
    with ServerProcess(["--device", "cpu", "--listen", f"unix:{path},127.0.0.1:0", "--shared-memory"]) as server:
        yield server


@pytest.fixture(autouse=True)
def _everything_is_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_remote, "SHARED_BYTES", 0)


@pytest.fixture(params=["socket", "grpc"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a request in shared memory is asked for, as ``Timing.transport`` tells it."""
    if request.param == "socket":
        return "shm"
    without_calls(monkeypatch)
    return "shm+grpc"


def without_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client takes the server for one that takes no calls on its socket, as those of before did not."""
    begin = Session.__init__

    def begin_with_an_old_server(session: Session, *arguments: Any) -> None:
        begin(session, *arguments)
        session.takes_calls = False

    monkeypatch.setattr(Session, "__init__", begin_with_an_old_server)


# --- Answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", load(), ids=lambda case: case.name)
def test_vectors_hold_through_shared_memory(sharing: ServerProcess, case: Case) -> None:
    with LossClient(sharing.target, transport="shm") as client:
        result = client.compute(case.logits, case.labels, case.loss_spec)
    assert result.timing.transport == "shm"
    case.check(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wire_dtype", [None, "float16", "bfloat16"])
@pytest.mark.parametrize("want_grad", [True, False])
def test_the_same_bits_as_over_grpc(
    sharing: ServerProcess, way: str, dtype: torch.dtype, wire_dtype: str | None, want_grad: bool
) -> None:
    logits, labels = tensors(120)
    logits = logits.to(dtype).transpose(2, 3)
    answers = []
    for transport in ("shm", "grpc"):
        with LossClient(sharing.target, transport=transport, wire_dtype=wire_dtype) as client:
            answers.append(client.compute(logits, labels, SOFTMAX, want_grad=want_grad))
    assert [answer.timing.transport for answer in answers] == [way, "grpc"]
    assert answers[0].loss == answers[1].loss
    if want_grad:
        assert answers[0].grad.dtype == answers[1].grad.dtype
        assert torch.equal(answers[0].grad, answers[1].grad)
    else:
        assert answers[0].grad is None


def test_auto_takes_shared_memory_where_it_can_be_had(sharing: ServerProcess, server: ServerProcess) -> None:
    for target, sessions in ((sharing.targets[0], 1), (sharing.targets[1], 0)):
        with LossClient(target) as client:
            assert client.compute(*tensors(100), SOFTMAX).loss > 0
            assert metric(sharing, "lovasz_shared_memory_sessions") == sessions
        assert eventually(lambda: metric(sharing, "lovasz_shared_memory_sessions") == 0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server on a Unix socket that takes no shared memory."""
    path = tmp_path_factory.mktemp("plain") / "s"
    with ForkedServer(["--device", "cpu", "--listen", f"unix:{path}"]) as server:
        yield server


def test_auto_falls_back_where_the_session_is_refused(plain: ServerProcess, caplog: pytest.LogCaptureFixture) -> None:
    """A socket file that nobody listens on any more, as of a server that was started anew without shared memory."""
    path = plain.target.removeprefix("unix:") + wire.MEMORY_SUFFIX
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left_over:
        left_over.bind(path)
    with LossClient(plain.target) as client:
        for _ in range(3):
            result = client.compute(*tensors(100), SOFTMAX)
            assert result.loss == pytest.approx(LossClient("inprocess").compute(*tensors(100), SOFTMAX).loss)
            assert result.timing.transport == "grpc"
    Path(path).unlink()
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("lovasz.client")]
    assert said.startswith("tensors go over gRPC, not through shared memory: ")
    assert "Connection refused" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a while")
def test_a_stranger_on_the_socket_gets_no_tensors(plain: ServerProcess) -> None:
    """Somebody else was first to bind the shared-memory socket beside that of gRPC. Each client looks there twice."""
    path = plain.target.removeprefix("unix:") + wire.MEMORY_SUFFIX
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger, ThreadPoolExecutor(1) as thread:
        stranger.bind(path)
        os.seteuid(65534)
        try:
            stranger.listen()  # Its user is who listens.
        finally:
            os.seteuid(0)
        packets = [thread.submit(welcomed, stranger) for _ in range(2)]
        with LossClient(plain.target, transport="shm") as client, pytest.raises(ServerUnavailableError) as refused:
            client.compute(*tensors(10), SOFTMAX)
        assert "of user 65534 listens for shared memory: got another user; expected the same" in str(refused.value)
        assert [packet.result(timeout=30) for packet in packets] == [b"", b""]
        packets = [thread.submit(welcomed, stranger) for _ in range(2)]
        with LossClient(plain.target) as client:
            assert client.compute(*tensors(10), SOFTMAX).timing.transport == "grpc"
        assert [packet.result(timeout=30) for packet in packets] == [b"", b""]
    Path(path).unlink()


def welcomed(listener: socket.socket) -> bytes:
    """What a caller that was greeted sends."""
    connection, _ = listener.accept()
    with connection:
        connection.send(pb.SharedMemoryReply(session=b"name", takes_calls=True).SerializeToString())
        return connection.recv(4096)


def test_ping_and_the_client_tell_the_way(
    sharing: ServerProcess, plain: ServerProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(target: str, transport: str = "auto") -> tuple[str, ...]:
        assert cli.main(["ping", target, "--count", "1"]) == 0
        said = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if "  tensors " in line]
        with LossClient(target, transport=transport) as client:
            assert client.compute(*tensors(100), SOFTMAX).timing.transport == client.transport()
            return client.transport(), *said

    unix, tcp = sharing.targets
    assert told(unix) == ("shm", "through shared memory, with header and answer on its socket")
    assert told(unix, "grpc")[0] == "grpc"
    assert told(tcp) == ("grpc",)
    assert told(plain.target) == ("grpc", "over gRPC")
    with LossClient(plain.target, transport="shm") as client, pytest.raises(ServerUnavailableError):
        client.transport()
    without_calls(monkeypatch)
    assert told(unix) == ("shm+grpc", "through shared memory, with header and answer over gRPC")


def test_a_small_request_goes_in_a_message_where_the_server_takes_no_calls_on_its_socket(
    sharing: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_calls(monkeypatch)
    monkeypatch.setattr(client_remote, "SHARED_BYTES", 64 << 10)
    with LossClient(sharing.target) as client:
        found = [client.compute(*tensors(side), SOFTMAX).timing.transport for side in (10, 10, 200, 10)]
    assert found == ["shm+grpc", "grpc", "shm+grpc", "grpc"]


def test_what_may_not_fit_into_a_packet_is_asked_for_over_grpc(sharing: ServerProcess) -> None:
    """The answer has the numbers of all classes, and the header their weights."""
    generator = torch.Generator().manual_seed(0)
    with LossClient(sharing.target) as client:
        for classes, expected in ((1000, "shm"), (3000, "shm+grpc")):
            logits = torch.randn(1, classes, 8, generator=generator)
            labels = torch.randint(0, classes, (1, 8), generator=generator)
            for loss in (SOFTMAX, LovaszSoftmax(class_weights=[1.0] * classes)):
                result = client.compute(logits, labels, loss)
                assert result.timing.transport == expected
                assert result.loss == LossClient("inprocess").compute(logits, labels, loss).loss


def test_ranks_on_the_socket_and_elsewhere_meet(sharing: ServerProcess) -> None:
    unix, tcp = sharing.targets
    ways = ((unix, "auto", "shm"), (unix, "grpc", "grpc"), (tcp, "auto", "grpc"))
    with ExitStack() as stack:
        clients = [stack.enter_context(LossClient(target, transport=kind)) for target, kind, _ in ways]
        for step in range(3):
            pending = [
                client.submit(*tensors(20, seed=rank), SOFTMAX, joint=Joint("meet", rank, 3, step=step))
                for rank, client in enumerate(clients)
            ]
            results = [future.result() for future in pending]
            assert len({result.loss for result in results}) == 1
            assert [result.timing.transport for result in results] == [way for _, _, way in ways]
        for rank, client in enumerate(clients):
            client.leave(Joint("meet", rank, 3, step=3), 0)
    assert eventually(lambda: metric(sharing, "lovasz_in_flight_bytes") == 0)  # No answer is kept for a retry.


def test_a_call_that_is_given_up_on_the_socket_leaves_its_step(sharing: ServerProcess) -> None:
    """By its timeout, by an end of its client, and by the death of its process."""
    waiting = partial(metric, sharing, "lovasz_joint_ranks_waiting")
    with LossClient(sharing.target) as client:
        with pytest.raises(DeadlineExceededError, match=r"\(DEADLINE_EXCEEDED\)"):
            client.compute(*tensors(9), SOFTMAX, joint=Joint("given up", 0, 2, step=0), timeout=0.3)
        assert eventually(lambda: waiting() == 0)
        future = client.submit(*tensors(9), SOFTMAX, joint=Joint("given up", 0, 2, step=1))
        assert eventually(lambda: waiting() == 1)
        client.close(cancel=True)
        with pytest.raises(CallCancelledError):
            future.result()
    assert eventually(lambda: waiting() == 0)
    code = f"""
from lovasz.client import Joint, LossClient, LovaszSoftmax
import numpy as np
with LossClient({sharing.target!r}) as client:
    arrays = np.zeros((1, 3, 9), np.float32), np.zeros((1, 9), np.uint8)
    client.compute(*arrays, LovaszSoftmax(), joint=Joint("given up", 0, 2, step=2))
"""
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        assert eventually(lambda: waiting() == 1)
        process.kill()
    assert eventually(lambda: waiting() == 0)


def test_a_client_that_is_dropped_ends_its_session_at_once(sharing: ServerProcess) -> None:
    """Not when Python looks for cycles, which a trainer that computes on a GPU hardly makes it do."""
    client = LossClient(sharing.target, transport="shm")
    client.compute(*tensors(200), SOFTMAX)
    assert metric(sharing, "lovasz_shared_memory_bytes") > 0
    gc.disable()
    try:
        del client
        assert eventually(lambda: metric(sharing, "lovasz_shared_memory_bytes") == 0)
    finally:
        gc.enable()


def test_calls_that_are_cancelled_before_they_begin_give_their_regions_back(sharing: ServerProcess) -> None:
    request = tensors(50)
    with LossClient(sharing.target, transport="shm", timeout=10) as client:
        for _ in range(wire.MAX_REGIONS + 1):
            client.compute(*request, SOFTMAX)  # Its region is shared, and idle then.
            go_on = threading.Event()
            busy = [client._threads.submit(go_on.wait) for _ in range(client._threads._max_threads)]
            pending = client.submit(*request, SOFTMAX)
            assert pending.cancel()
            go_on.set()
            for one in busy:
                one.result()
        assert eventually(lambda: len(client._target._shared.regions._idle) == 1)
        assert client.compute(*request, SOFTMAX).timing.transport == "shm"


def test_a_child_of_a_fork_has_its_own_session_and_memory(sharing: ServerProcess) -> None:
    code = f"""
import os, sys
import numpy as np
from lovasz.client import LossClient, LovaszSoftmax
random = np.random.RandomState(0)
logits, labels = random.randn(1, 3, 400).astype(np.float32), random.randint(0, 3, (1, 400)).astype(np.uint8)
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
client = LossClient({sharing.target!r})
first = client.compute(logits, labels, LovaszSoftmax())
child = os.fork()
for turn in range(300):
    factor = 2 if child else 3
    result = client.compute(factor * logits, labels, LovaszSoftmax())
    assert result.timing.transport == "shm"
    if turn == 0:
        own = result
    assert result.loss == own.loss != first.loss
    assert np.array_equal(result.grad, own.grad)
if not child:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
client.close()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_a_child_of_a_fork_that_closes_its_client_leaves_the_calls_of_its_parent_alone(
    sharing: ServerProcess, transport: str
) -> None:
    """The parent waits in a joint step meanwhile, with so many pixels that they are streamed over gRPC."""
    code = f"""
import os, signal, sys
import numpy as np
from lovasz.client import Joint, LossClient, LovaszSoftmax
arrays = np.zeros((1, 3, 300_000), np.float32), np.zeros((1, 300_000), np.uint8), LovaszSoftmax()
client = LossClient({sharing.target!r}, transport={transport!r})
client.compute(*arrays)
shared = client._target._shared
session = shared and shared._session
future = client.submit(*arrays, joint=Joint("forked {transport}", 0, 2, step=0))
sys.stdin.readline()
if os.fork() == 0:
    signal.alarm(20)  # Ends a child that waits forever.
    client.close()
    os._exit(0)
assert os.wait()[1] == 0
client.compute(*arrays, joint=Joint("forked {transport}", 1, 2, step=0))
future.result()
assert (shared and shared._session) is session
for rank in range(2):
    client.leave(Joint("forked {transport}", rank, 2, step=1), 0)
client.close()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True) as process:
        try:
            assert eventually(lambda: metric(sharing, "lovasz_joint_ranks_waiting") == 1)
            process.communicate("\n", timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    assert eventually(lambda: metric(sharing, "lovasz_in_flight_bytes") == 0)  # No answer is kept for a retry.


def test_gradients_stay_what_they_are_when_the_memory_is_used_again(sharing: ServerProcess) -> None:
    with LossClient(sharing.target, transport="shm") as client, LossClient(sharing.target, transport="grpc") as other:
        kept = [client.compute(*tensors(64, seed=seed), SOFTMAX).grad.view(-1)[7:] for seed in range(8)]
        for seed, grad in enumerate(kept):
            assert torch.equal(grad, other.compute(*tensors(64, seed=seed), SOFTMAX).grad.view(-1)[7:])
        del kept, grad
        for seed in range(8):
            client.compute(*tensors(64, seed=seed), SOFTMAX)
        assert metric(sharing, "lovasz_shared_memory_bytes") < 6 * 2 * 4 * 4 * 64 * 64, "memory is not used again"
        last = client.compute(*tensors(64), SOFTMAX).grad
    assert torch.equal(last, LossClient("inprocess").compute(*tensors(64), SOFTMAX).grad), "after the client is closed"


def test_training_in_threads_through_one_client(sharing: ServerProcess) -> None:
    with LossClient(sharing.target, transport="shm") as client, LossClient(sharing.target, transport="grpc") as other:
        pending = [client.submit(*tensors(70 + seed % 3, seed=seed), SOFTMAX) for seed in range(40)]
        for seed, future in enumerate(pending):
            expected = other.compute(*tensors(70 + seed % 3, seed=seed), SOFTMAX)
            assert torch.equal(future.result().grad, expected.grad)


def test_more_gradients_are_kept_than_the_server_takes_regions(sharing: ServerProcess) -> None:
    most = wire.MAX_REGIONS
    with LossClient(sharing.target, transport="shm") as client, LossClient("inprocess") as own:
        kept = [client.compute(*tensors(20, seed=seed), SOFTMAX) for seed in range(most + 4)]
        futures = [client.submit(*tensors(20, seed=seed), SOFTMAX) for seed in range(2 * most)]
        for results in (kept, [future.result() for future in futures]):
            for seed, result in enumerate(results):
                assert torch.equal(result.grad, own.compute(*tensors(20, seed=seed), SOFTMAX).grad)


def test_a_call_without_a_region_waits_or_goes_over_grpc(
    sharing: ServerProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wire, "MAX_REGIONS", 1)
    with LossClient(sharing.target, transport="auto") as auto, LossClient(sharing.target, transport="shm") as shm:
        taken = []
        for client in (auto, shm):
            assert client.compute(*tensors(20), SOFTMAX).timing.transport == "shm"
            memory = client._target._shared
            taken.append((memory, memory.take(1)))  # In use from now on.
        assert auto.compute(*tensors(20), SOFTMAX).timing.transport == "grpc"
        with pytest.raises(ServerOverloadedError, match=r"1 regions are in use, .* use transport=\"auto\""):
            shm.compute(*tensors(20), SOFTMAX, timeout=0.2)
        waiting = shm.submit(*tensors(20), SOFTMAX)
        for memory, region in taken:
            memory.regions.give(region)
        assert waiting.result(30).timing.transport == "shm"
        assert auto.compute(*tensors(20), SOFTMAX).timing.transport == "shm"
    assert not caplog.messages, "shared memory was left for a while"


def test_where_this_process_can_have_no_more_regions(
    sharing: ServerProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(name: str, flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with LossClient(sharing.target, transport="auto") as auto, LossClient(sharing.target, transport="shm") as shm:
        kept = [client.compute(*tensors(20), SOFTMAX) for client in (auto, shm)]
        monkeypatch.setattr(os, "memfd_create", refuses)
        for _ in range(2):
            over_grpc = auto.compute(*tensors(20), SOFTMAX)
            assert over_grpc.timing.transport == "grpc"
            assert torch.equal(over_grpc.grad, kept[0].grad)
        with pytest.raises(LossError, match=r"shared memory: no region of \d+ bytes: Too many open files"):
            shm.compute(*tensors(20), SOFTMAX)
        assert [message.count("Too many open files") for message in caplog.messages] == [1]
        monkeypatch.undo()
        assert shm.compute(*tensors(20), SOFTMAX).timing.transport == "shm"


def test_a_loss_module_through_shared_memory(sharing: ServerProcess) -> None:
    grads = []
    for transport in ("shm", "grpc"):
        logits, labels = tensors(90)
        criterion = RemoteLoss(sharing.target, SOFTMAX, transport=transport)
        (3 * criterion(logits.requires_grad_(), labels)).backward()
        criterion.close()
        grads.append(logits.grad)
    assert torch.equal(grads[0], grads[1])


def test_a_call_without_time_is_said_to_be_late(sharing: ServerProcess) -> None:
    target = RemoteTarget(sharing.target, ClientOptions(transport=Transport.SHM))
    call = target.prepare(*tensors(20), weighted_sum(SOFTMAX), want_grad=True, joint=None, offsets=None, timeout=1)
    with pytest.raises(DeadlineExceededError):
        call.compute(-0.001)
    target.close()


# --- What can go wrong --------------------------------------------------------------------------------------------


def test_shared_memory_needs_a_unix_socket_and_a_server_that_takes_it(
    server: ServerProcess, plain: ServerProcess
) -> None:
    with pytest.raises(ValueError, match=r"transport: got 'shm' with the target .*; expected a target unix:/path"):
        LossClient(server.target, transport="shm")
    with LossClient(plain.target, transport="shm") as client, pytest.raises(ServerUnavailableError) as refused:
        client.compute(*tensors(10), SOFTMAX)
    assert "started with --shared-memory?" in str(refused.value)


def test_a_restart_of_the_server_is_ridden_out(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--listen", f"unix:{tmp_path}/s", "--shared-memory"]
    with LossClient(f"unix:{tmp_path}/s", transport="shm", timeout=20) as client:
        with ForkedServer(arguments) as first:
            before = client.compute(*tensors(80), SOFTMAX).grad.clone()  # The next call has the same memory.
            first.kill()
        with ForkedServer(arguments) as second:
            again = client.compute(*tensors(80), SOFTMAX)
            assert metric(second, "lovasz_shared_memory_sessions") == 1
    assert torch.equal(before, again.grad)


ORDER = """
import os, socket, sys
from lovasz.server import __main__
from lovasz.server.transport.grpc_server import GrpcServer
from lovasz.server.transport.shared_memory import SharedMemory

path, start, stop = sys.argv.pop(1), GrpcServer.start, SharedMemory.stop

def start_grpc(server):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(path + ".memory")
    start(server)

def stop_sharing(shared):
    assert not os.path.exists(path) and os.path.exists(path + ".memory")
    stop(shared)

GrpcServer.start, SharedMemory.stop = start_grpc, stop_sharing
sys.exit(__main__.main())
"""


def test_a_server_listens_for_shared_memory_all_the_time_that_its_grpc_answers(tmp_path: Path) -> None:
    server = ForkedServer(["--device", "cpu", "--listen", f"unix:{tmp_path}/s", "--shared-memory"])
    server._command[1:3] = ["-c", ORDER, f"{tmp_path}/s"]
    with server:
        assert server.stop() == 0, server.log


@pytest.mark.parametrize("transport", ["auto", "shm"])
def test_a_server_that_starts_between_two_looks_of_a_client_shares_memory_at_once(
    sharing: ServerProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, transport: str
) -> None:
    with late_socket(sharing, monkeypatch) as asked, LossClient(sharing.target, transport=transport) as client:
        assert [client.compute(*tensors(30), SOFTMAX).timing.transport for _ in range(2)] == ["shm", "shm"]
    assert len(asked) == 1
    with late_socket(sharing, monkeypatch) as asked, LossClient(sharing.target, transport=transport) as client:
        assert client.transport() == "shm"
    assert len(asked) == 1
    assert not [record for record in caplog.records if record.name.startswith("lovasz.client")]


def test_a_call_that_a_server_refuses_as_it_stops_leaves_the_clients_other_calls_alone(tmp_path: Path) -> None:
    """One waits for the other rank of its step, which the server still accepts: it finishes what it has begun."""
    listen = ["--listen", f"unix:{tmp_path}/s,127.0.0.1:0"]
    with ExitStack() as stack:
        server = stack.enter_context(ForkedServer(["--device", "cpu", *listen, "--shared-memory"]))
        client, other = (stack.enter_context(LossClient(target)) for target in server.targets)
        assert other.compute(*tensors(9), SOFTMAX).loss > 0
        first = client.submit(*tensors(9), SOFTMAX, joint=Joint("stop", 0, 2, step=0))
        assert eventually(lambda: metric(server, "lovasz_joint_ranks_waiting") == 1)
        stopped = stack.enter_context(ThreadPoolExecutor()).submit(server.stop)
        assert eventually(lambda: any(line["event"] == "draining" for line in server.log))
        with pytest.raises(ServerUnavailableError, match="stop"):
            client.compute(*tensors(9), SOFTMAX, timeout=0.3)
        second = other.compute(*tensors(9), SOFTMAX, joint=Joint("stop", 1, 2, step=0))
        assert first.result().loss == second.loss
        assert first.result().timing.transport == "shm"
        assert stopped.result() == 0


def test_a_second_server_does_not_take_the_place_of_one_that_lives(sharing: ServerProcess) -> None:
    second = ForkedServer(["--device", "cpu", "--listen", sharing.target, "--shared-memory"])
    with pytest.raises(RuntimeError, match="another server is there"), second:
        pass
    with LossClient(sharing.target, transport="shm") as client:
        assert client.compute(*tensors(20), SOFTMAX).loss > 0


class Refused(Exception):
    """The server's error."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(code, text)
        self.code, self.text = code, text


class Raw:
    """A caller that says of its memory what it likes, on the socket or over gRPC."""

    def __init__(self, server: ServerProcess, carrier: str, loss: LossLike = SOFTMAX, *, shift: int = 0) -> None:
        """Shares a region with a request.

        Args:
            shift: how far its tensors are from where a client puts them, in bytes.
        """
        self._on_socket = carrier == "socket"
        logits, labels = self.tensors = tensors(40)
        specs = (
            wire.TensorSpec(wire.dtype_named("float32"), tuple(logits.shape)),
            wire.TensorSpec(wire.dtype_named("uint8"), tuple(labels.shape)),
        )
        self.request = wire.Request.checked(weighted_sum(loss), *specs, want_grad=True)
        first, second, third, size = (place + shift for place in self.request.places)
        self.session = Session(server.targets[0].removeprefix("unix:") + wire.MEMORY_SUFFIX, 10)
        self.region = Region(size)
        self.region.array(first, specs[0].shape, specs[0].dtype.numpy)[...] = logits.numpy()
        self.region.array(second, specs[1].shape, specs[1].dtype.numpy)[...] = labels.numpy()
        self.session.share(self.region)
        self.shared = wire.SharedTensors(self.session.name, self.region.number, first, second, third)
        self.channel = grpc.insecure_channel(server.targets[1])
        self.call = self.channel.unary_unary(
            "/lovasz.v1.LossService/Compute",
            request_serializer=framing.UnaryRequest.encode,
            response_deserializer=framing.UnaryResponse.decode,
        )

    def ask(self, logits: bytes = b"", **changes: Any) -> pb.ResponseHeader:
        shared = self.shared._replace(**changes)
        header = replace(self.request, shared=shared).to_proto()
        try:
            if self._on_socket:
                return self.session.socket.call(pb.SharedMemoryRequest(call=pb.SharedMemoryCall(header=header)), 30)
            return self.call(framing.UnaryRequest(header, logits, b""), timeout=30).header
        except grpc.RpcError as error:
            raise Refused(error.code().name, error.details()) from None

    def close(self) -> None:
        self.channel.close()
        self.session.close()
        self.region.close()


@pytest.fixture(params=["socket", "grpc"])
def carrier(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def raw(sharing: ServerProcess, carrier: str) -> Iterator[Raw]:
    raw = Raw(sharing, carrier)
    yield raw
    assert raw.ask().loss > 0, "the server goes on"
    raw.close()
    assert metric(sharing, "lovasz_in_flight_bytes") == 0
    assert metric(sharing, "lovasz_requests_total", code="INTERNAL") == 0
    assert eventually(lambda: metric(sharing, "lovasz_shared_memory_sessions") == 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"region": 10**9}, "shared_tensors.region: got 1000000000; expected the number of a region that is shared"),
        ({"logits_offset": -1}, "shared_tensors.logits_offset: got -1 for 25600 bytes in a region of"),
        ({"labels_offset": 2**62}, f"shared_tensors.labels_offset: got {2**62} for 1600 bytes in a region of"),
        ({"grad_offset": 30_000}, "shared_tensors.grad_offset: got 30000 for 25600 bytes in a region of"),
    ],
)
def test_memory_that_is_not_there_is_refused_by_name(raw: Raw, changes: dict[str, object], said: str) -> None:
    with pytest.raises(Refused) as refused:
        raw.ask(**changes)
    assert refused.value.code == "INVALID_ARGUMENT"
    assert refused.value.text.startswith(said)


@pytest.mark.parametrize("carrier", ["grpc"])
def test_tensors_beside_memory_are_refused(raw: Raw) -> None:
    with pytest.raises(Refused, match="logits: got 4 bytes beside shared_tensors; expected none"):
        raw.ask(logits=b"1234")


@pytest.mark.parametrize("carrier", ["socket"])
def test_what_cannot_be_asked_on_the_socket_is_refused_by_name(raw: Raw) -> None:
    header = replace(raw.request, shared=raw.shared).to_proto()
    header.ClearField("shared_tensors")
    with pytest.raises(grpc.RpcError) as refused:
        raw.session.socket.call(pb.SharedMemoryRequest(call=pb.SharedMemoryCall(header=header)), 30)
    assert refused.value.details().startswith("shared_tensors: got none; expected where the tensors are")
    header = replace(raw.request, shared=raw.shared).to_proto()
    for tensor, shape in ((header.logits, [1, 4000, 1]), (header.labels, [1, 1])):
        tensor.shape[:] = shape
    with pytest.raises(grpc.RpcError) as refused:
        raw.session.socket.call(pb.SharedMemoryRequest(call=pb.SharedMemoryCall(header=header)), 30)
    assert "expected at most 65536 on the shared-memory socket: make this call with Compute" in refused.value.details()


def test_a_session_that_is_not_there_is_refused(raw: Raw) -> None:
    with pytest.raises(Refused) as refused:
        raw.ask(session=b"0123456789abcdef")
    assert refused.value.code == "UNAVAILABLE"
    assert "has ended, or belongs to another server" in refused.value.text


def test_tensors_that_overlap_change_nothing_but_the_callers_own_answer(raw: Raw) -> None:
    assert raw.ask(grad_offset=raw.shared.logits_offset).loss > 0
    raw.region.array(0, (1,), np.dtype(np.float32))[...] = 0.5


@pytest.mark.parametrize("shift", [64, 1, 4])
def test_tensors_may_begin_anywhere(sharing: ServerProcess, carrier: str, shift: int) -> None:
    with closing(Raw(sharing, carrier, shift=shift)) as raw:
        answer = raw.ask()
        expected = compute(*raw.tensors, SOFTMAX)
        assert answer.loss == expected.loss
        grad = raw.region.bytes(raw.shared.grad_offset, raw.request.grad_bytes)
        assert expected.grad is not None
        assert grad.tobytes() == expected.grad.numpy().tobytes()


@pytest.mark.parametrize("carrier", ["grpc"])
def test_memory_is_not_taken_by_a_server_that_shares_none(server: ServerProcess, raw: Raw) -> None:
    with grpc.insecure_channel(server.target) as channel:
        call = channel.unary_unary("/lovasz.v1.LossService/Compute", request_serializer=framing.UnaryRequest.encode)
        header = replace(raw.request, shared=raw.shared).to_proto()
        with pytest.raises(grpc.RpcError) as refused:
            call(framing.UnaryRequest(header, b"", b""))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "this server shares no memory (--shared-memory)" in refused.value.details()


def test_memory_that_is_scribbled_over_and_torn_down_while_it_is_used(sharing: ServerProcess, carrier: str) -> None:
    """Labels and logits change under the server's hands, then the session ends in the middle of calls."""
    losses = (SOFTMAX, LovaszSoftmax(input="probabilities"), [(1.0, CrossEntropy()), (1.0, SOFTMAX)])
    for round_ in range(9):
        raw, stop = Raw(sharing, carrier, losses[round_ % 3]), threading.Event()

        def scribble(raw: Raw = raw, stop: threading.Event = stop) -> None:
            random = np.random.default_rng(0)
            everything = raw.region.array(0, (raw.region.nbytes,), np.dtype(np.uint8))
            while not stop.is_set():
                everything[...] = random.integers(0, 256, everything.size, np.uint8)

        thread = threading.Thread(target=scribble)
        thread.start()
        codes = set()
        for call in range(30):
            if call == 20:
                raw.session.close()
            try:
                raw.ask()
            except Refused as error:
                codes.add(error.code)
        stop.set()
        thread.join()
        raw.close()
        assert codes <= {"INVALID_ARGUMENT", "UNAVAILABLE"}
        assert "UNAVAILABLE" in codes
        assert eventually(lambda: metric(sharing, "lovasz_shared_memory_sessions") == 0)
        if round_ == 0:  # by now gRPC and the metrics have opened what they keep
            before = Footprint.of(sharing.pid).descriptors
    # gRPC may open one more; a leak in each of the eight further rounds would be eight at least.
    assert eventually(lambda: Footprint.of(sharing.pid).descriptors.total() <= before.total() + 4), (
        f"{before} before, {Footprint.of(sharing.pid).descriptors} after"
    )
    with LossClient(sharing.target, transport="shm") as client:
        assert client.compute(*tensors(20), SOFTMAX).loss > 0
