"""Spans of calls for OpenTelemetry, sent to a collector by OTLP. Imported only where they are asked for."""

from __future__ import annotations

import logging
import threading
import time

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from lovasz.server.observe.tracing import EndedCall
from lovasz.version import VERSION

_log = logging.getLogger(__name__)

_DEFAULT_NAME = "lovasz-server"
_STOP_SECONDS = 5.0
"""How long the last spans may take to be sent."""
_FAULTS = frozenset({"INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED"})
"""Codes for which a server's span counts as failed; others are their callers' mistakes, or refusals."""


class Spans:
    """Records each call as a span of its caller's trace, with a child for each of its phases.

    OpenTelemetry's own variables apply: ``OTEL_SERVICE_NAME``, ``OTEL_TRACES_SAMPLER``,
    ``OTEL_EXPORTER_OTLP_HEADERS`` and so on.
    """

    def __init__(self, endpoint: str) -> None:
        """Sends to a collector from now on, in a thread of its own; what cannot be sent is dropped.

        Args:
            endpoint: http://HOST:PORT for plain text, or https://HOST:PORT.
        """
        named = Resource.create({SERVICE_VERSION: VERSION})
        if str(named.attributes[SERVICE_NAME]).startswith("unknown_service"):
            named = named.merge(Resource({SERVICE_NAME: _DEFAULT_NAME}))
        self._provider = TracerProvider(resource=named, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("lovasz.server", VERSION)
        self._propagator = TraceContextTextMapPropagator()

    def record(self, call: EndedCall) -> None:
        """As :class:`lovasz.server.observe.tracing.SpanRecorder`."""
        try:
            self._record(call)
        except Exception:
            _log.exception("a span cannot be recorded")

    def _record(self, call: EndedCall) -> None:
        epoch = time.time() - time.monotonic()
        carrier = {key: value for key, value in call.metadata if isinstance(value, str)}
        parent = self._propagator.extract(carrier)
        service, _, method = call.name.rpartition("/")
        span = self._tracer.start_span(
            call.name,
            parent,
            trace.SpanKind.SERVER,
            {
                "rpc.system": "grpc",
                "rpc.service": service,
                "rpc.method": method,
                "lovasz.code": call.code,
                **{f"lovasz.{key}": value for key, value in call.attributes.items() if value},
            },
            start_time=_nanoseconds(call.began + epoch),
        )
        if span.is_recording():
            inside = trace.set_span_in_context(span, parent)
            for phase, phase_began, phase_ended in call.phases:
                child = self._tracer.start_span(phase, inside, start_time=_nanoseconds(phase_began + epoch))
                child.end(_nanoseconds(phase_ended + epoch))
            if call.code in _FAULTS:
                span.set_status(trace.StatusCode.ERROR, call.code)
        span.end()

    def stop(self) -> None:
        """Sends what is left, if that does not take long."""
        last = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        last.start()
        last.join(_STOP_SECONDS)


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
