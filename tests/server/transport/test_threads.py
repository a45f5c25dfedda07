"""The threads of calls: what becomes of a call that finds none."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
import pytest

from lovasz.server.observe.metrics import Metrics
from lovasz.server.transport.lanes import Lanes
from lovasz.server.transport.threads import CallThreads, LimitedHandler
from lovasz.wire import PUSHBACK_KEY

SERVICE = "lovasz.v1.LossService"


@pytest.fixture
def held() -> threading.Event:
    """A call is being served."""
    return threading.Event()


@pytest.fixture
def go_on() -> threading.Event:
    return threading.Event()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def target(metrics: Metrics, held: threading.Event, go_on: threading.Event) -> Iterator[str]:
    """A server with two threads, one of them for each connection, whose methods wait."""

    def answer(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        held.set()
        assert go_on.wait(30)
        return next(messages)

    handlers = dict.fromkeys(("Compute", "LeaveRun"), grpc.stream_unary_rpc_method_handler(answer))
    threads = CallThreads(2, Lanes(), 1)
    service = LimitedHandler(grpc.method_handlers_generic_handler(SERVICE, handlers), threads, metrics)
    server = grpc.server(threads, handlers=[service])  # type: ignore[arg-type]
    port = server.add_insecure_port("127.0.0.1:0")
    threads.start_all()
    server.start()
    yield f"127.0.0.1:{port}"
    go_on.set()
    server.stop(None).wait()
    threads.shutdown()


@pytest.fixture
def channels(target: str) -> Iterator[list[grpc.Channel]]:
    """Each with a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.insecure_channel(target, options=options) for _ in range(3)]
    yield channels
    for channel in channels:
        channel.close()


def begin(channel: grpc.Channel, method: str, message: bytes) -> grpc.Future:
    return channel.unary_unary(f"/{SERVICE}/{method}").future(message, timeout=30)


def test_a_call_that_finds_no_thread_is_told_when_to_try_again_and_is_counted(
    channels: list[grpc.Channel], metrics: Metrics, held: threading.Event, go_on: threading.Event
) -> None:
    """It is a second one of its connection, or there are as many as threads."""
    first, second, third = channels
    served = [begin(first, "Compute", b"first")]
    assert held.wait(30)
    for channel, method, loss in ((first, "Compute", "unknown"), (third, "LeaveRun", "none")):
        refused = begin(channel, method, b"refused")
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.details() == "too many calls at a time (--max-requests)"
        assert dict(refused.trailing_metadata())[PUSHBACK_KEY] == "1000"
        labels = {"method": method, "loss": loss, "code": "RESOURCE_EXHAUSTED"}
        assert metrics.registry.get_sample_value("lovasz_requests_total", labels) == 1
        if channel is first:
            held.clear()
            served.append(begin(second, "Compute", b"second"))
            assert held.wait(30)
    assert metrics.registry.get_sample_value("lovasz_rejections_total", {"reason": "no_requests"}) == 2
    assert begin(third, "Unknown", b"").code() is grpc.StatusCode.UNIMPLEMENTED
    go_on.set()
    assert [call.result() for call in served] == [b"first", b"second"]
