"""Calls over the shared-memory socket: how they are answered, refused and ended. What computes is stood in for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from support.memory_caller import MemoryCaller
from support.waiting import eventually

from lovasz import wire
from lovasz.server.observe.metrics import Metrics
from lovasz.server.transport.carrier import Carrier
from lovasz.server.transport.lanes import Lanes
from lovasz.server.transport.shared_memory import SharedMemory
from lovasz.server.transport.socket_calls import SocketThreads
from lovasz.v1 import loss_pb2 as pb

MOST = 3


class Service:
    """Answers a call with the number of axes of its logits. It waits for ``go_on`` if the call's run is "held"."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.held: list[Carrier] = []
        self.ended = threading.Semaphore(0)
        self.answer = pb.ResponseHeader()

    def compute(self, header: pb.RequestHeader, carrier: Carrier) -> pb.ResponseHeader:
        if header.run == "fault":
            raise RuntimeError("a secret")
        if header.run == "refused":
            carrier.set_trailing_metadata(((wire.PUSHBACK_KEY, "250"),))
            carrier.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room")
        if header.run == "held":
            assert carrier.add_callback(self.ended.release)
            self.held.append(carrier)
            assert self.go_on.wait(30)
        answer = pb.ResponseHeader(loss=len(header.logits.shape))
        answer.MergeFrom(self.answer)
        return answer


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def server(service: Service, metrics: Metrics, tmp_path: Path) -> Iterator[SharedMemory]:
    server = SharedMemory(str(tmp_path / "s"), 1 << 20, 1 << 20)
    threads = SocketThreads(MOST, service.compute, Lanes(), metrics)
    threads.start_all()
    server.offer(threads)
    server.start()
    yield server
    service.go_on.set()
    server.stop()
    threads.stop(wait=True)


@pytest.fixture
def caller(server: SharedMemory) -> Iterator[MemoryCaller]:
    caller = MemoryCaller(server.path)
    yield caller
    caller.close()


def header(axes: int = 2, run: str = "") -> pb.RequestHeader:
    return pb.RequestHeader(logits=pb.TensorInfo(shape=[1] * axes), run=run)


def held(service: Service, count: int) -> bool:
    return eventually(lambda: len(service.held) == count)


def test_the_first_packet_says_that_calls_are_taken(caller: MemoryCaller) -> None:
    assert caller.hello is not None
    assert caller.hello.takes_calls


def test_calls_are_answered_by_number_when_they_are_done(caller: MemoryCaller, service: Service) -> None:
    caller.ask(7, header(run="held"))
    caller.ask(-5, header(axes=4))
    first = caller.answer()
    assert (first.number, first.header.loss) == (-5, 4)
    service.go_on.set()
    second = caller.answer()
    assert (second.number, second.header.loss) == (7, 2)


def test_what_the_carrier_tells_of_a_call(caller: MemoryCaller, service: Service) -> None:
    call = pb.SharedMemoryCall(number=1, header=header(run="held"), timeout_seconds=1000, metadata={"a": "b"})
    caller.socket.send(pb.SharedMemoryRequest(call=call).SerializeToString())
    assert held(service, 1)
    carrier = service.held[0]
    assert list(carrier.invocation_metadata()) == [("a", "b")]
    assert carrier.peer().startswith("unix:uid=")
    assert 900 < (carrier.time_remaining() or 0) <= 1000
    assert carrier.is_active()
    caller.ask(2, header(run="held"))
    assert held(service, 2)
    assert service.held[1].time_remaining() is None


def test_processes_of_another_pid_namespace_are_told_apart(
    server: SharedMemory, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel calls all of them process 0."""
    monkeypatch.setattr(wire, "peer_of", lambda _: (0, 1000))
    callers = [MemoryCaller(server.path) for _ in range(2)]
    for count, (caller, number) in enumerate([(callers[0], 1), (callers[0], 2), (callers[1], 1)], start=1):
        caller.ask(number, header(run="held"))
        assert held(service, count)
    one, two = (f"unix:uid=1000,connection={number}" for number in (1, 2))
    assert [carrier.peer() for carrier in service.held] == [one, one, two]
    service.go_on.set()
    for caller in callers:
        caller.close()


def test_an_error_has_its_code_its_text_and_its_delay(caller: MemoryCaller) -> None:
    caller.ask(1, header(run="refused"))
    error = caller.answer().error
    assert (error.code, error.text, error.retry_after_milliseconds) == ("RESOURCE_EXHAUSTED", "no room", 250)


def test_a_fault_outside_the_service_is_told_in_no_detail(
    caller: MemoryCaller, caplog: pytest.LogCaptureFixture
) -> None:
    caller.ask(1, header(run="fault"))
    error = caller.answer().error
    assert (error.code, "secret" in error.text) == ("INTERNAL", False)
    assert "a secret" in caplog.text
    caller.ask(1, header())
    assert caller.answer().header.loss == 2


def refusals(metrics: Metrics, code: str, reason: str) -> tuple[float | None, float | None]:
    """How many the requests and the rejections have of them."""
    labels = {"method": "SharedMemory", "loss": "unknown", "code": code}
    counted = metrics.registry.get_sample_value("lovasz_requests_total", labels)
    return counted, metrics.registry.get_sample_value("lovasz_rejections_total", {"reason": reason})


def test_a_number_that_is_in_flight_is_refused(caller: MemoryCaller, service: Service, metrics: Metrics) -> None:
    caller.ask(1, header(run="held"))
    caller.ask(1, header())
    error = caller.answer().error
    assert (error.code, error.text.startswith("call.number: got 1, which is in flight")) == ("INVALID_ARGUMENT", True)
    assert refusals(metrics, "INVALID_ARGUMENT", "invalid") == (1, 1)
    service.go_on.set()
    assert caller.answer().header.loss == 2


def test_a_call_without_a_thread_is_refused_with_a_delay_and_regions_are_still_taken(
    server: SharedMemory, caller: MemoryCaller, service: Service, metrics: Metrics
) -> None:
    for number in range(MOST):
        caller.ask(number, header(run="held"))
    assert held(service, MOST)
    other = MemoryCaller(server.path)
    for one in (caller, other):
        one.ask(99, header())
        answer = one.answer()
        assert (answer.number, answer.error.code) == (99, "RESOURCE_EXHAUSTED")
        assert answer.error.retry_after_milliseconds > 0
    assert refusals(metrics, "RESOURCE_EXHAUSTED", "no_requests") == (2, 2)
    assert other.release(5) == ""
    service.go_on.set()
    assert {caller.answer().number for _ in range(MOST)} == set(range(MOST))
    other.ask(100, header())
    assert other.answer().header.loss == 2
    other.close()


def test_a_thread_is_free_before_its_caller_has_the_answer(caller: MemoryCaller, service: Service) -> None:
    for number in range(MOST):
        caller.ask(number, header(run="held"))
    assert held(service, MOST)
    service.go_on.set()
    for number in range(200):
        assert caller.answer().HasField("header")
        caller.ask(MOST + number, header())
    assert all(caller.answer().HasField("header") for _ in range(MOST))


def test_a_call_that_is_cancelled_ends_at_once_and_gets_no_answer(caller: MemoryCaller, service: Service) -> None:
    caller.ask(1, header(run="held"))
    assert held(service, 1)
    caller.cancel(8)  # There is no such call.
    caller.cancel(1)
    assert service.ended.acquire(timeout=30)
    carrier = service.held[0]
    assert not carrier.is_active()
    assert not carrier.add_callback(lambda: None)
    service.go_on.set()
    caller.ask(2, header(axes=3))
    assert caller.answer().header.loss == 3


def test_the_end_of_the_connection_ends_its_calls(server: SharedMemory, caller: MemoryCaller, service: Service) -> None:
    other = MemoryCaller(server.path)
    other.ask(1, header(run="held"))
    assert held(service, 1)
    for number in (1, 2):
        caller.ask(number, header(run="held"))
    assert held(service, 3)
    caller.close()
    assert service.ended.acquire(timeout=30)
    assert service.ended.acquire(timeout=30)
    assert sorted(carrier.is_active() for carrier in service.held) == [False, False, True]
    service.go_on.set()
    assert other.answer().header.loss == 2
    other.close()


def test_a_deadline_ends_its_call_alone(caller: MemoryCaller, service: Service) -> None:
    caller.ask(1, header(run="held"), seconds=1000)
    caller.ask(2, header(run="held"), seconds=0.05)
    assert service.ended.acquire(timeout=30)
    assert held(service, 2)
    assert not service.ended.acquire(timeout=0.1)
    assert sorted(carrier.is_active() for carrier in service.held) == [False, True]


@pytest.mark.parametrize("seconds", [0.0, -5.0, float("nan")])
def test_a_call_without_time_ends(caller: MemoryCaller, service: Service, seconds: float) -> None:
    service.go_on.set()
    caller.ask(1, header(), seconds=seconds)
    assert caller.answer().number == 1
    caller.ask(2, header(), seconds=float("inf"))
    assert caller.answer().header.loss == 2


def test_a_packet_that_is_too_long_is_refused(caller: MemoryCaller) -> None:
    refused = caller.say(
        pb.SharedMemoryRequest(call=pb.SharedMemoryCall(header=header(run="x" * 70_000))).SerializeToString()
    )
    assert refused == f"packet: got a longer one; expected at most {wire.MAX_PACKET_BYTES} bytes"
    caller.ask(1, header(run="x" * 60_000))
    assert caller.answer().header.loss == 2


def test_a_caller_that_reads_no_answers_is_let_go_and_the_others_are_served(
    server: SharedMemory, caller: MemoryCaller, service: Service
) -> None:
    service.answer.intersection.extend([1 << 40] * 8000)
    deaf = MemoryCaller(server.path)
    with pytest.raises(OSError, match=r"Broken pipe|reset"):  # noqa: PT012 - at one of them
        for number in range(100_000):
            deaf.ask(number, header())
    assert eventually(lambda: server.sessions == 1)
    deaf.close()
    caller.ask(1, header())
    assert caller.answer().header.loss == 2


def test_an_answer_that_is_about_to_leave_leaves_when_the_server_stops(
    server: SharedMemory, caller: MemoryCaller, service: Service
) -> None:
    caller.ask(1, header(run="held"))
    assert held(service, 1)
    threading.Timer(0.2, service.go_on.set).start()
    server.stop()
    assert caller.answer().header.loss == 2
    assert caller.reply() is None
