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
def channel(metrics: Metrics, held: threading.Event, go_on: threading.Event) -> Iterator[grpc.Channel]:
    """To a server with one thread, whose methods wait."""

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        held.set()
        assert go_on.wait(30)
        return request

    handlers = dict.fromkeys(("Compute", "LeaveRun"), grpc.unary_unary_rpc_method_handler(answer))
    threads = CallThreads(1, Lanes())
    service = LimitedHandler(grpc.method_handlers_generic_handler(SERVICE, handlers), threads, metrics)
    server = grpc.server(threads, handlers=[service])  # type: ignore[arg-type]
    port = server.add_insecure_port("127.0.0.1:0")
    threads.start_all()
    service.start_threads()
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    server.stop(None).wait()
    service.end_threads(wait=True)
    threads.shutdown()


def test_a_call_that_finds_no_thread_is_told_when_to_try_again_and_is_counted(
    channel: grpc.Channel, metrics: Metrics, held: threading.Event, go_on: threading.Event
) -> None:
    served = channel.unary_unary(f"/{SERVICE}/Compute").future(b"first", timeout=30)
    assert held.wait(30)
    for method, loss in (("Compute", "unknown"), ("LeaveRun", "none")):
        refused = channel.unary_unary(f"/{SERVICE}/{method}").future(b"second", timeout=30)
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.details() == "too many calls at a time (--max-requests)"
        assert dict(refused.trailing_metadata())[PUSHBACK_KEY] == "1000"
        labels = {"method": method, "loss": loss, "code": "RESOURCE_EXHAUSTED"}
        assert metrics.registry.get_sample_value("lovasz_requests_total", labels) == 1
    assert metrics.registry.get_sample_value("lovasz_rejections_total", {"reason": "no_requests"}) == 2
    unknown = channel.unary_unary(f"/{SERVICE}/Unknown").future(b"", timeout=30)
    assert unknown.code() is grpc.StatusCode.UNIMPLEMENTED
    go_on.set()
    assert served.result() == b"first"
