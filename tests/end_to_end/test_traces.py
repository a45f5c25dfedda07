"""Spans of a real server, as a collector of OpenTelemetry receives them, under the spans of a client's process."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest
from support.fork_server import ForkedServer

from lovasz.client import InvalidInputError, LossClient, LovaszSoftmax

if grpc.__version__ == "1.63.0":
    pytest.skip("OpenTelemetry's stubs need grpcio 1.63.2", allow_module_level=True)
pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")
pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="the extra otel is not installed")
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

LOGITS, LABELS = np.zeros((1, 3, 8, 8), np.float32), np.zeros((1, 8, 8), np.uint8)
SOFTMAX = LovaszSoftmax()


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that it receives, with the resources that sent them."""

    spans: list[Any] = field(default_factory=list)
    resources: list[dict[str, str]] = field(default_factory=list)
    target: str = ""

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        for resource in request.resource_spans:
            self.resources.append(values(resource.resource.attributes))
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()


def values(attributes: Any) -> dict[str, str]:
    return {one.key: one.value.string_value for one in attributes}


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
        collector.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield collector
        server.stop(None).wait()


def test_a_call_is_a_span_of_its_callers_trace_with_a_child_for_each_phase(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{collector.target}")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")  # All spans wait until the server stops.
    own = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(own))
    with ForkedServer(["--device", "cpu"]) as server, LossClient(server.target, run="traced") as client:
        with provider.get_tracer("trainer").start_as_current_span("step") as step:
            client.submit(LOGITS, LABELS, SOFTMAX).result()
            with pytest.raises(InvalidInputError):
                client.compute(LOGITS, LABELS + 9, SOFTMAX)
        client.compute(LOGITS, LABELS, SOFTMAX)
    assert [span.name for span in own.get_finished_spans()] == ["step"]  # The client starts none.
    (resource,) = collector.resources
    assert (resource["service.name"], resource["deployment.environment"]) == ("lovasz-server", "test")
    (alone,) = [span for span in collector.spans if span.parent_span_id == b""]
    assert alone.name == "lovasz.v1.LossService/Compute"
    context = step.get_span_context()
    spans = [span for span in collector.spans if int.from_bytes(span.trace_id, "big") == context.trace_id]
    calls = [span for span in spans if int.from_bytes(span.parent_span_id, "big") == context.span_id]
    answered, refused = sorted(calls, key=lambda span: int(span.start_time_unix_nano))
    assert (answered.name, answered.kind) == ("lovasz.v1.LossService/Compute", 2)
    assert values(answered.attributes) == {
        "rpc.system": "grpc",
        "rpc.service": "lovasz.v1.LossService",
        "rpc.method": "Compute",
        "lovasz.code": "OK",
        "lovasz.loss": "lovasz_softmax",
        "lovasz.run": "traced",
    }
    assert values(refused.attributes)["lovasz.code"] == "INVALID_ARGUMENT"
    assert (answered.status.code, refused.status.code) == (0, 0)  # A caller's mistake is no failure of the server.

    phases = [span for span in spans if span.parent_span_id == answered.span_id]
    assert {span.name for span in phases} == {"receive", "queue", "compute", "copy", "send"}
    in_order = sorted(phases, key=lambda span: (span.start_time_unix_nano, span.end_time_unix_nano))
    times = [time for span in in_order for time in (span.start_time_unix_nano, span.end_time_unix_nano)]
    assert times[0] >= answered.start_time_unix_nano - 1000  # Rounded.
    assert times[-1] <= answered.end_time_unix_nano + 1_000_000
    assert in_order[0].name == "receive"
    assert in_order[-1].name == "send"
