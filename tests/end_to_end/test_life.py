"""A server's life: coming up, being watched, being full, losing callers, draining."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.fork_server import ForkedServer
from support.http2 import Connection
from support.messages import header_of, tensors
from support.scrape import metric
from support.waiting import eventually

from lovasz import wire
from lovasz.client import LossClient, LovaszSoftmax, ServerOverloadedError, ServerUnavailableError
from lovasz.client.retry import FIRST_ATTEMPTS
from lovasz.server import launch
from lovasz.server.launch import ServerProcess
from lovasz.spec import LOSS_KINDS
from lovasz.v1 import loss_pb2 as pb
from lovasz.v1 import loss_pb2_grpc
from lovasz.version import VERSION

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SOFTMAX = LovaszSoftmax()


def held_open(target: str, header: pb.RequestHeader) -> tuple[grpc.Channel, grpc.Call, threading.Event]:
    """A stream whose header was sent, and whose payload does not come."""
    release = threading.Event()

    def messages() -> Iterator[pb.ComputeStreamRequest]:
        yield pb.ComputeStreamRequest(header=header)
        release.wait(60)

    channel = grpc.insecure_channel(target)
    return channel, loss_pb2_grpc.LossServiceStub(channel).ComputeStream(messages()), release


def reflected(channel: grpc.Channel) -> grpc.Call:
    """A stream of the reflection service that has asked for the services, and stays open."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    wanted = reflection_pb2.ServerReflectionRequest(list_services="")
    return stub.ServerReflectionInfo(itertools.chain([wanted], iter(threading.Event().wait, True)))


def test_the_log_tells_when_it_is_ready_and_where(server: ServerProcess) -> None:
    (ready,) = [line for line in server.log if line["event"] == "ready"]
    assert ready["listen"] == server.target
    assert ready["metrics"] == server.metrics_url
    assert ready["device"] == "cpu"
    assert ready["version"] == VERSION
    assert ready["level"] == "info"


def test_server_info(server: ServerProcess) -> None:
    with LossClient(server.target) as client:
        info = client.server_info()
    assert info.version == VERSION
    assert [(device.name, device.healthy) for device in info.devices] == [("cpu", True)]
    assert info.losses == LOSS_KINDS
    assert info.memory_budget_bytes == 4 << 30


def test_reflection_is_off_unless_it_is_asked_for(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.target) as channel, pytest.raises(grpc.RpcError) as refused:
        next(reflected(channel))
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_reflection_names_the_services_to_two_callers_at_a_time() -> None:
    with (
        ForkedServer(["--device", "cpu", "--reflection"]) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        streams = [reflected(channel) for _ in range(2)]
        for stream in streams:
            names = {service.name for service in next(stream).list_services_response.service}
            assert {"lovasz.v1.LossService", "grpc.health.v1.Health"} <= names
        with pytest.raises(grpc.RpcError) as refused:
            next(reflected(channel))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for stream in streams:
            stream.cancel()


def test_metrics_are_served_in_the_format_of_prometheus(server: ServerProcess) -> None:
    with urllib.request.urlopen(server.metrics_url) as page:
        assert page.headers["Content-Type"].startswith("text/plain")
        text = page.read().decode()
    assert 'lovasz_build_info{backend="numba",device="cpu",hardware="CPU, ' in text
    assert metric(server, "lovasz_starting") == 0
    assert metric(server, "lovasz_access_files_valid") == 1
    assert "# HELP lovasz_phase_seconds " in text
    assert metric(server, "lovasz_device_healthy") == 1
    assert metric(server, "lovasz_budget_bytes") == 4 << 30


@pytest.mark.parametrize("service", ["", "lovasz.v1.LossService"])
def test_health_says_serving(server: ServerProcess, service: str) -> None:
    with grpc.insecure_channel(server.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest(service=service)).status == SERVING
        with pytest.raises(grpc.RpcError) as unknown:
            stub.Check(health_pb2.HealthCheckRequest(service="other"))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_server_that_is_not_ready_in_time_is_ended_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "START_SECONDS", 0.25)
    server = ServerProcess(["--device", "cpu"])
    with pytest.raises(RuntimeError, match=r"^the server was not ready within 0\.25 s: .* --device cpu"):
        server.__enter__()
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


def test_a_port_that_is_taken_ends_the_start_with_a_reason() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flag in ("--listen", "--metrics-listen"):
            addresses = {"--listen": "127.0.0.1:0", "--metrics-listen": "127.0.0.1:0", flag: f"127.0.0.1:{port}"}
            arguments = [word for pair in addresses.items() for word in pair]
            ended = subprocess.run(
                [sys.executable, "-m", "lovasz.server", *arguments], capture_output=True, text=True, timeout=100
            )
            assert ended.returncode == 2
            assert f"{flag} 127.0.0.1:{port}: " in ended.stderr
            assert "Traceback" not in ended.stderr


def test_a_unix_socket(tmp_path: object) -> None:
    with ForkedServer(["--device", "cpu", "--listen", f"unix:{tmp_path}/s"]) as server, LossClient(server.target) as c:
        assert server.target == f"unix:{tmp_path}/s"
        assert c.compute(*tensors(8), SOFTMAX).loss > 0


def test_over_budget_is_refused_from_the_header_and_room_comes_back() -> None:
    logits, labels = tensors(64)  # 65,536 bytes of logits, twice with the gradient, and 4,096 of labels
    with ForkedServer(["--device", "cpu", "--memory-budget", "200KiB"]) as server, LossClient(server.target) as client:
        channel, call, release = held_open(server.target, header_of(logits, labels))
        assert eventually(lambda: metric(server, "lovasz_in_flight_bytes") == 2 * logits.nbytes + labels.nbytes)
        full = pytest.raises(ServerOverloadedError, match=r"132 KiB of 200 KiB are in use")
        with LossClient(server.target, timeout=2.0) as new, full:
            new.compute(logits, labels, SOFTMAX)
        # Also a client that has had no answer yet asks until its timeout, waiting as long as the server says.
        assert metric(server, "lovasz_rejections_total", reason="no_bytes") > FIRST_ATTEMPTS
        assert client.compute(*tensors(16), SOFTMAX).loss > 0
        call.cancel()
        release.set()
        channel.close()
        assert eventually(lambda: metric(server, "lovasz_in_flight_bytes") == 0)
        assert client.compute(logits, labels, SOFTMAX).loss > 0
        with pytest.raises(ServerOverloadedError, match=r"whole budget is 200 KiB"):
            client.compute(*tensors(256), SOFTMAX)
        assert metric(server, "lovasz_rejections_total", reason="too_large") == 1, "what can never fit is not retried"


def test_too_many_requests_are_refused_while_health_is_still_answered() -> None:
    header = header_of(*tensors(8))
    with ForkedServer(["--device", "cpu", "--max-requests", "2"]) as server, LossClient(server.target) as client:
        held = [held_open(server.target, header) for _ in range(2)]
        assert eventually(lambda: metric(server, "lovasz_in_flight_requests") == 2)
        full = pytest.raises(ServerOverloadedError, match=r"2 requests are in flight, of at most 2")
        with LossClient(server.target, timeout=2.0) as new, full:
            new.compute(*tensors(8), SOFTMAX)
        with grpc.insecure_channel(server.target) as channel:
            assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status == SERVING
        for channel, call, release in held:
            call.cancel()
            release.set()
            channel.close()
        assert eventually(lambda: metric(server, "lovasz_in_flight_requests") == 0)
        assert client.compute(*tensors(8), SOFTMAX).loss > 0


def test_streams_that_send_no_header_leave_threads_for_others_and_end() -> None:
    release = threading.Event()

    def nothing() -> Iterator[pb.ComputeStreamRequest]:
        release.wait(60)
        yield from ()

    with (
        ForkedServer(["--device", "cpu", "--max-requests", "2"]) as server,
        LossClient(server.target) as client,
        grpc.insecure_channel(server.target) as channel,
    ):
        calls = [loss_pb2_grpc.LossServiceStub(channel).ComputeStream(nothing()) for _ in range(60)]
        refused = {"code": "RESOURCE_EXHAUSTED", "method": "ComputeStream"}
        # Of one connection, 32 are taken, and one more if it comes within a moment of the first.
        assert eventually(lambda: metric(server, "lovasz_requests_total", **refused) >= 27)
        for _ in range(3):
            check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert check.status == SERVING
        assert client.compute(*tensors(8), SOFTMAX).loss > 0
        assert eventually(lambda: all(call.done() for call in calls))
        ended = Counter(call.code() for call in calls)
        assert ended[grpc.StatusCode.RESOURCE_EXHAUSTED] in (27, 28)
        assert {code.name for code in ended} <= {"RESOURCE_EXHAUSTED", "ABORTED", "CANCELLED"}
        release.set()


def test_callers_that_go_away_leave_nothing_behind(server: ServerProcess) -> None:
    """In the middle of the payload, right after it, and while the answer is sent."""
    logits, labels = tensors(1500)  # More than what gRPC takes over from the server at once.
    cancelled = threading.Event()
    request = [pb.ComputeStreamRequest(header=header_of(logits, labels))]
    request += [
        pb.ComputeStreamRequest(chunk=bytes(chunk))
        for chunk in wire.chunks([wire.as_bytes(logits), wire.as_bytes(labels)], 1 << 18)
    ]
    before = metric(server, "lovasz_requests_total", code="CANCELLED")

    def half() -> Iterator[pb.ComputeStreamRequest]:
        yield from request[: len(request) // 2]
        cancelled.wait(30)

    with grpc.insecure_channel(server.target) as channel:
        stub = loss_pb2_grpc.LossServiceStub(channel)
        middle = stub.ComputeStream(half())
        assert eventually(lambda: metric(server, "lovasz_in_flight_requests") == 1)
        middle.cancel()
        cancelled.set()
        assert eventually(lambda: metric(server, "lovasz_in_flight_requests") == 0)
        whole = stub.ComputeStream(iter(request))
        assert eventually(lambda: metric(server, "lovasz_in_flight_requests") >= 1)
        whole.cancel()
        answered = stub.ComputeStream(iter(request))
        next(answered)
        answered.cancel()
        assert eventually(lambda: metric(server, "lovasz_in_flight_requests") == 0)
    assert metric(server, "lovasz_in_flight_bytes") == 0
    assert eventually(lambda: metric(server, "lovasz_requests_total", code="CANCELLED") == before + 3)
    with LossClient(server.target) as client:
        assert client.compute(*tensors(16), SOFTMAX).loss > 0


def is_refused(target: str) -> bool:
    """Whether a new call is refused because the server is stopping."""
    with LossClient(target) as client:
        try:
            client.compute(*tensors(8), SOFTMAX, timeout=20)
        except ServerUnavailableError:
            return True
    return False


def test_those_who_watch_health_and_do_not_read_hold_up_nobody() -> None:
    watch = "/grpc.health.v1.Health/Watch"
    with ForkedServer(["--device", "cpu"]) as server, Connection(server.target, window=0) as lazy:
        for _ in range(20):
            lazy.call(watch, b"")
        with grpc.insecure_channel(server.target) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for _ in range(10):
                assert stub.Check(health_pb2.HealthCheckRequest(), timeout=5).status == SERVING
            assert next(stub.Watch(health_pb2.HealthCheckRequest(), timeout=60)).status == SERVING
        assert eventually(lambda: len(lazy.ended) == 20)
        assert server.stop() == 0


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_other_signals_that_end_programs_drain_it_too(signum: signal.Signals) -> None:
    if signal.getsignal(signum) is signal.SIG_IGN:
        pytest.skip("the tests run under nohup, and so does the server")
    with ServerProcess(["--device", "cpu"]) as server:
        os.kill(server.pid, signum)
        assert eventually(lambda: any(line["event"] == "draining" for line in server.log))
        assert server.stop() == 0


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    """As nohup does."""
    code = """
import signal
from lovasz.server.__main__ import _on_signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)  # As shells do with what they start in the background.
_on_signals(lambda: None)
assert callable(signal.getsignal(signal.SIGINT))
assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
assert callable(signal.getsignal(signal.SIGTERM))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert ran.returncode == 0, ran.stderr


def test_a_signal_that_interrupts_the_wait_for_it_is_not_lost() -> None:
    """Its handler runs in the thread that it interrupts, which may hold any lock of what it waits for."""
    code = """
import os, signal, threading
from lovasz.server.__main__ import _on_signals, _Stopping
stopping = _Stopping()
_on_signals(stopping.set_by_signal)
with stopping._cond:
    signal.raise_signal(signal.SIGTERM)
    assert stopping.is_set()
stopping.wait_here()
for act, *arguments in ((os.kill, os.getpid(), signal.SIGINT), (lambda: stopping.set(),)):
    stopping = _Stopping()
    _on_signals(stopping.set_by_signal)
    threading.Timer(0.2, act, arguments).start()
    stopping.wait_here()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert ran.returncode == 0, ran.stderr


def test_sigterm_finishes_what_was_accepted_and_takes_nothing_new() -> None:
    logits, labels = tensors(256)
    request = pb.ComputeStreamRequest(header=header_of(logits, labels))
    with ServerProcess(["--device", "cpu"]) as server:
        go_on = threading.Event()

        def slowly() -> Iterator[pb.ComputeStreamRequest]:
            yield request
            go_on.wait(60)
            for chunk in wire.chunks([wire.as_bytes(logits), wire.as_bytes(labels)]):
                yield pb.ComputeStreamRequest(chunk=bytes(chunk))

        with grpc.insecure_channel(server.target) as channel, grpc.insecure_channel(server.target) as watching:
            accepted = loss_pb2_grpc.LossServiceStub(channel).ComputeStream(slowly())
            assert eventually(lambda: metric(server, "lovasz_in_flight_requests") == 1)
            health = health_pb2_grpc.HealthStub(watching).Watch(health_pb2.HealthCheckRequest())
            assert next(health).status == SERVING
            status: list[int] = []
            stopping = threading.Thread(target=lambda: status.append(server.stop()))
            stopping.start()
            assert next(health).status == NOT_SERVING
            assert eventually(lambda: any(line["event"] == "draining" for line in server.log))
            # It is logged a moment before new calls are refused.
            assert eventually(lambda: is_refused(server.target))
            go_on.set()
            received = list(accepted)
        stopping.join()
        assert status == [0]
    assert sum(len(message.chunk) for message in received) == logits.nbytes
    assert server.log[-1]["event"] == "stopped"


def test_a_restart_is_ridden_out_by_the_clients_retries() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = ["--device", "cpu", "--listen", address]
    with LossClient(address) as client:
        with ForkedServer(arguments) as first:
            before = client.compute(*tensors(16), SOFTMAX)
            first.kill()
        waiting = client.submit(*tensors(16), SOFTMAX)
        with ForkedServer(arguments):
            assert waiting.result().loss == before.loss


def test_the_server_does_not_come_up_without_the_device_that_was_asked_for() -> None:
    with pytest.raises(RuntimeError, match=r"torch sees \d+ CUDA devices here"), ServerProcess(["--device", "cuda:99"]):
        pass


def test_what_does_not_finish_in_time_is_cut_off_and_the_exit_status_says_so() -> None:
    with ServerProcess(["--device", "cpu", "--drain-seconds", "0.3"]) as server:
        channel, call, release = held_open(server.target, header_of(*tensors(8)))
        assert eventually(lambda: metric(server, "lovasz_in_flight_requests") == 1)
        status = server.stop()
        with pytest.raises(grpc.RpcError):
            list(call)
        release.set()
        channel.close()
    assert status == 1
    assert server.log[-1]["event"] == "stopped"
    assert server.log[-1]["unfinished_requests"] == 1
