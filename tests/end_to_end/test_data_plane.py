"""Tensors of any size on their way: over budget, stalled, given up, killed; and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from support import http2
from support.client_to_kill import LARGE
from support.footprint import Footprint, available_bytes, forget_peak, peak_bytes
from support.fork_server import Forked, ForkedServer
from support.messages import messages_of, request_of, tensors
from support.scrape import metric
from support.waiting import eventually

from lovasz.client import (
    CrossEntropy,
    DeadlineExceededError,
    LossClient,
    LossError,
    LovaszSoftmax,
    ServerOverloadedError,
)
from lovasz.client.errors import from_rpc_error
from lovasz.client.torch import RemoteLoss
from lovasz.server.launch import ServerProcess
from lovasz.v1 import loss_pb2 as pb
from lovasz.v1 import loss_pb2_grpc

SOFTMAX = LovaszSoftmax()
GIB = 1 << 30


@contextmanager
def stream(target: str, messages: Iterator[pb.ComputeStreamRequest]) -> Iterator[grpc.Call]:
    """A call whose receiver takes no more than it reads: gRPC would guess a window, of up to all of an answer."""
    with grpc.insecure_channel(target, options=[("grpc.http2.bdp_probe", 0)]) as channel:
        yield loss_pb2_grpc.LossServiceStub(channel).ComputeStream(messages)


@pytest.fixture(scope="module")
def impatient() -> Iterator[ServerProcess]:
    """A server that waits only so long for its callers."""
    with ForkedServer(["--device", "cpu", "--stall-timeout", "0.5", "--header-timeout", "0.5"]) as server:
        yield server


# --- Over budget --------------------------------------------------------------------------------------------------


def test_what_is_over_budget_is_refused_before_its_payload_is_read() -> None:
    """50 clients begin to send a GiB each to a server that may hold a quarter of one."""
    logits, labels = np.zeros((1, 16, 4096, 4096), np.float32), np.zeros((1, 4096, 4096), np.uint8)
    assert logits.nbytes == GIB
    with ServerProcess(["--device", "cpu", "--memory-budget", "256MiB"]) as server:
        with LossClient(server.target) as client:
            client.compute(*tensors(600), SOFTMAX)
        before = Footprint.of(server.pid).resident_bytes
        forget_peak(server.pid)

        def ask(_: int) -> str:
            with LossClient(server.target) as client, pytest.raises(ServerOverloadedError) as refused:
                client.compute(logits, labels, SOFTMAX)
            return str(refused.value)

        with ThreadPoolExecutor(50) as pool:
            said = list(pool.map(ask, range(50)))
        assert all("whole budget is 256 MiB" in text for text in said)
        assert metric(server, "lovasz_rejections_total", reason="too_large") == 50
        rise = peak_bytes(server.pid) - before
        assert rise < 192 << 20, f"{rise >> 20} MiB of 50 GiB were read"
        assert metric(server, "lovasz_in_flight_bytes") == 0


# --- Callers that stall -------------------------------------------------------------------------------------------


@contextmanager
def stalled_sender(target: str, logits: np.ndarray, labels: np.ndarray) -> Iterator[grpc.Call]:
    """A stream that stops in the middle of its payload."""
    release = threading.Event()

    def half() -> Iterator[pb.ComputeStreamRequest]:
        yield from messages_of(logits, labels)[:5]
        release.wait()

    with stream(target, half()) as call:
        try:
            yield call
        finally:
            release.set()


def test_a_sender_that_stalls_is_cut_off_with_a_reason() -> None:
    """The time is long enough for what is sent to arrive on a busy machine, too."""
    logits, labels = tensors(900)
    with ForkedServer(["--device", "cpu", "--stall-timeout", "2"]) as server:
        with stalled_sender(server.target, logits, labels) as call, pytest.raises(grpc.RpcError) as cut_off:
            list(call)
        assert cut_off.value.code() is grpc.StatusCode.ABORTED
        text = cut_off.value.details()
        assert f"4194304 of {logits.nbytes + labels.nbytes} bytes of the payload arrived" in text
        assert "in the last 2 s (--stall-timeout)" in text
        assert metric(server, "lovasz_stalled_total", phase="receive") == 1
        assert metric(server, "lovasz_in_flight_bytes") == 0


def test_a_sender_that_stalls_holds_up_nobody() -> None:
    """It stalls all the time, however slow the machine is."""
    with (
        ForkedServer(["--device", "cpu", "--stall-timeout", "600"]) as server,
        LossClient(server.target) as client,
        stalled_sender(server.target, *tensors(900)) as call,
    ):
        assert eventually(lambda: metric(server, "lovasz_in_flight_requests") == 1)
        assert client.compute(*tensors(16), SOFTMAX).loss > 0
        assert client.compute(*tensors(800), SOFTMAX).loss > 0, "another stream"
        assert eventually(lambda: metric(server, "lovasz_in_flight_requests") == 1)
        assert call.is_active(), "it was not there all the time"
        call.cancel()
        assert eventually(lambda: metric(server, "lovasz_in_flight_bytes") == 0)


def test_a_stream_without_a_header_is_cut_off(impatient: ServerProcess) -> None:
    release = threading.Event()

    def nothing() -> Iterator[pb.ComputeStreamRequest]:
        release.wait(60)
        yield from ()

    before = metric(impatient, "lovasz_stalled_total", phase="receive")
    with stream(impatient.target, nothing()) as call:
        with pytest.raises(grpc.RpcError) as cut_off:
            list(call)
        release.set()
    assert cut_off.value.code() is grpc.StatusCode.ABORTED
    assert cut_off.value.details() == "no header arrived within 0.5 s (--header-timeout)"
    error = from_rpc_error(cut_off.value, impatient.target)
    assert isinstance(error, LossError)
    assert "--header-timeout" in str(error)
    assert metric(impatient, "lovasz_stalled_total", phase="receive") == before + 1


def test_a_request_of_one_message_has_as_long_as_a_payload(impatient: ServerProcess) -> None:
    """The whole of it comes long after the header's time."""
    logits, labels = tensors(60)  # The answer fits into the window.
    data = http2.message(request_of(logits, labels).SerializeToString())
    part = len(data) // 10
    with http2.Connection(impatient.target) as caller:
        stream = caller.open("/lovasz.v1.LossService/Compute")
        for place in range(0, 9 * part, part):
            assert caller.send(stream, data[place : place + part])
            time.sleep(0.25)
        assert caller.send(stream, data[9 * part :], end=True)
        assert eventually(lambda: stream in caller.ended)
        assert len(caller.received[stream]) > logits.nbytes


def test_a_request_of_one_message_that_does_not_come_is_cut_off_with_a_reason() -> None:
    release = threading.Event()

    def nothing() -> Iterator[bytes]:
        release.wait(60)
        yield from ()

    limits = ["--header-timeout", "0.5", "--payload-timeout", "0.5"]
    with ForkedServer(["--device", "cpu", *limits]) as server, grpc.insecure_channel(server.target) as channel:
        call = channel.stream_unary("/lovasz.v1.LossService/Compute").future(nothing(), timeout=60)
        assert call.code() is grpc.StatusCode.ABORTED
        assert call.details() == "no message arrived within 1 s (--header-timeout and --payload-timeout)"
        release.set()
        assert eventually(lambda: metric(server, "lovasz_requests_total", method="Compute", code="ABORTED") == 1)
        assert metric(server, "lovasz_stalled_total", phase="receive") == 1
        assert metric(server, "lovasz_abandoned_total") == 0
    assert any(line["event"] == "a request was refused" and line["reason"] == call.details() for line in server.log)


def test_a_receiver_that_stalls_is_cut_off(impatient: ServerProcess) -> None:
    with stream(impatient.target, iter(messages_of(*tensors(2000)))) as call:
        next(call)
        assert eventually(lambda: metric(impatient, "lovasz_stalled_total", phase="send") == 1)
        with pytest.raises(grpc.RpcError):
            list(call)
    assert eventually(lambda: metric(impatient, "lovasz_in_flight_bytes") == 0)


def test_a_slow_sender_that_keeps_sending_is_waited_for(impatient: ServerProcess) -> None:
    messages = messages_of(*tensors(300))

    def slowly() -> Iterator[pb.ComputeStreamRequest]:
        for message in messages:
            time.sleep(0.3)
            yield message

    with stream(impatient.target, slowly()) as call:
        assert next(call).header.loss > 0


# --- Callers that go away -----------------------------------------------------------------------------------------


def test_a_deadline_that_passes_ends_the_work_wherever_it_is(server: ServerProcess) -> None:
    logits, labels = np.zeros((1, 19, 1500, 1500), np.float32), np.zeros((1, 1500, 1500), np.uint8)
    before = metric(server, "lovasz_abandoned_total", reason="expired")
    with LossClient(server.target) as client:
        for timeout in (0.02, 0.1, 0.2, 0.3):
            try:
                client.compute(logits, labels, SOFTMAX, timeout=timeout)
            except DeadlineExceededError:
                assert eventually(lambda: metric(server, "lovasz_in_flight_bytes") == 0)
        assert client.compute(*tensors(16), SOFTMAX).loss > 0
    assert metric(server, "lovasz_abandoned_total", reason="expired") > before


def killed(phase: str, target: str, after: float = 0.0) -> None:
    """A client that is killed when it has come to this phase."""
    command = [sys.executable, "-m", "support.client_to_kill", phase, target]
    process = Forked(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "there\n"
        time.sleep(after)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


def test_clients_that_are_killed_leave_nothing_behind(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--listen", f"127.0.0.1:0,unix:{tmp_path}/s", "--shared-memory"]
    with ServerProcess(arguments) as server:
        tcp, unix = server.targets

        def empty() -> bool:
            names = ("in_flight_bytes", "in_flight_requests", "shared_memory_sessions", "shared_memory_bytes")
            return all(metric(server, f"lovasz_{name}") == 0 for name in names)

        def kill_all() -> Footprint:
            for phase in ("header", "payload", "result"):
                killed(phase, tcp)
                assert eventually(empty), phase
            killed("holding", unix)
            assert eventually(empty), "holding shared memory"
            for target in (tcp, unix):  # In the queue, in the computation, in the answer: wherever it is then.
                for after in (0.05, 0.2, 0.5):
                    killed("compute", target, after)
                    assert eventually(empty), f"{after} s after the call to {target}"
            with LossClient(unix) as client:
                assert client.compute(*LARGE, SOFTMAX).loss > 0
            assert eventually(empty)
            # What is kept for next requests is given back to the system when none come.
            assert eventually(lambda: metric(server, "lovasz_staging_idle_bytes") == 0)
            return Footprint.of(server.pid)

        def as_before() -> bool:
            now = Footprint.of(server.pid)
            return (
                now.descriptors.total() <= first.descriptors.total()
                and now.threads <= first.threads
                and now.resident_bytes <= first.resident_bytes + (64 << 20)
                and now.shared_files <= first.shared_files
            )

        first = kill_all()
        kill_all()
        # grpcio 1.63 keeps the sockets and buffers of some killed clients until others come; 1.85 does not.
        assert grpc.__version__.startswith("1.63.") or eventually(as_before), (
            f"{first}, and then {Footprint.of(server.pid)}"
        )
        assert (
            sum(
                metric(server, "lovasz_abandoned_total", reason="cancelled", phase=phase)
                for phase in ("receive", "queue", "compute", "send")
            )
            >= 8
        )
        assert metric(server, "lovasz_requests_total", code="INTERNAL") == 0


# --- Size ---------------------------------------------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.timeout(400)
def test_four_gibibytes_of_logits_go_through() -> None:
    """Equal logits, so that loss and gradient are known."""
    if available_bytes() < 18 * GIB:
        pytest.skip("needs 18 GiB of free memory")
    classes, side = 16, 1 << 12
    logits, labels = np.zeros((4, classes, side, side), np.float32), np.zeros((4, side, side), np.uint8)
    assert logits.nbytes == 4 * GIB
    with ServerProcess(["--device", "cpu", "--memory-budget", "12GiB"]) as server, LossClient(server.target) as client:
        result = client.compute(logits, labels, CrossEntropy(), timeout=300)
        assert result.loss == pytest.approx(np.log(classes), rel=1e-6)
        assert result.grad.shape == logits.shape
        for grad, expected in ((result.grad[:, 0], 1 / classes - 1), (result.grad[:, 1:], 1 / classes)):
            assert grad.min() == grad.max() == pytest.approx(expected / labels.size, rel=1e-6)
        del result, grad
        assert metric(server, "lovasz_requests_total", method="ComputeStream", code="OK") == 1
        assert metric(server, "lovasz_in_flight_bytes") == 0
        assert eventually(lambda: Footprint.of(server.pid).resident_bytes < 2 * GIB)


# --- Sixteen bits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wire_dtype", "bound"), [("float16", 3e-3), ("bfloat16", 2e-2), ("float32", 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [30, 400], ids=["unary", "stream"])
def test_logits_that_are_rounded_for_the_wire(
    server: ServerProcess, wire_dtype: str, bound: float, dtype: torch.dtype, side: int
) -> None:
    scores = torch.randn(1, 8, side, side, generator=torch.Generator().manual_seed(side)).to(dtype)
    labels = torch.randint(0, 8, (1, side, side), generator=torch.Generator().manual_seed(1))
    grads = []
    for rounded_to in (None, wire_dtype):
        logits = scores.clone().requires_grad_()
        criterion = RemoteLoss(server.target, SOFTMAX, wire_dtype=rounded_to)
        criterion(logits, labels).backward()
        criterion.close()
        assert logits.grad is not None
        assert logits.grad.dtype == dtype
        grads.append(logits.grad.double())
    error = float((grads[1] - grads[0]).norm() / grads[0].norm())
    assert error <= bound
    assert error > 0 or wire_dtype == "float32"


def test_a_gradient_of_a_million_pixels_does_not_underflow_in_float16(server: ServerProcess) -> None:
    logits, labels = tensors(1024, classes=3)
    with LossClient(server.target, wire_dtype="float16") as half, LossClient(server.target) as full:
        ours, truth = half.compute(logits, labels, CrossEntropy()), full.compute(logits, labels, CrossEntropy())
    assert np.abs(truth.grad).max() < 2.0**-19, "no case for scaling"
    assert (ours.grad != 0).all()
    assert np.linalg.norm(ours.grad - truth.grad) < 2e-3 * np.linalg.norm(truth.grad)


def test_what_a_wire_dtype_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match=r"wire_dtype: got 'int8'; expected None or one of float32, float16, bfloat16"):
        LossClient("localhost:1", wire_dtype="int8")
    with pytest.raises(ValueError, match=r"transport: got 'rdma'; expected one of auto, grpc, shm"):
        LossClient("localhost:1", transport="rdma")


def test_logits_beyond_float16_make_the_loss_nan_and_not_an_error(server: ServerProcess) -> None:
    logits, labels = tensors(16)
    logits[0, 0, 0, 0] = 1e6
    with LossClient(server.target, wire_dtype="float16") as client:
        assert np.isnan(client.compute(logits, labels, SOFTMAX).loss)
        assert not np.isnan(client.compute(*tensors(16), SOFTMAX).loss)
