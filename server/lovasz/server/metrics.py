"""Every metric of the server, declared here and served in Prometheus' text format on an HTTP port of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PHASES = ("header", "payload", "joint", "queue", "compute", "result")
"""What a request goes through, for what ends in one of them."""
_ELEMENTS = tuple(float(4**k) for k in range(5, 17))


class Metrics:
    """The server's metrics, in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "lovasz_requests",
            "Requests answered, by method, kind of loss and gRPC status code.",
            ["method", "loss", "code"],
            registry=registry,
        )
        self.phase_seconds = Histogram(
            "lovasz_phase_seconds",
            "Time that a request spent in each phase: receive, joint (waiting for other ranks), queue, compute (of its "
            "batch), send.",
            ["phase"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.rejections = Counter(
            "lovasz_rejections", "Requests refused at their header, by reason.", ["reason"], registry=registry
        )
        self.abandoned = Counter(
            "lovasz_abandoned",
            "Requests that were given up before their answer was sent: cancelled by their caller, or expired; and the "
            "phase that they were in.",
            ["reason", "phase"],
            registry=registry,
        )
        self.stalled = Counter(
            "lovasz_stalled",
            "Calls that were cut off as their caller stopped sending its request, or taking its answer.",
            ["phase"],
            registry=registry,
        )
        self.joint_groups = Counter(
            "lovasz_joint_groups",
            "Joint steps that ended: completed, or broken as ranks were missing until the timeout, or left, or had no "
            "room.",
            ["outcome"],
            registry=registry,
        )
        self.elements = Counter("lovasz_elements", "Logits computed.", registry=registry)
        self.nonfinite_results = Counter(
            "lovasz_nonfinite_results", "Answers that were NaN as their logits were not finite.", registry=registry
        )
        self._batch_requests = Histogram(
            "lovasz_batch_requests", "Requests computed in one batch.", buckets=_REQUESTS, registry=registry
        )
        self._batch_elements = Histogram(
            "lovasz_batch_elements", "Logits computed in one batch.", buckets=_ELEMENTS, registry=registry
        )
        self._build = Info("lovasz_build", "The server's version and what it runs on.", registry=registry)
        for phase in ("receive", "joint", "queue", "compute", "send"):
            self.phase_seconds.labels(phase)
        for outcome in ("completed", "timeout", "left", "overloaded", "stopping"):
            self.joint_groups.labels(outcome)
        for reason in ("overloaded", "too_large", "stopping", "invalid", "mismatch"):
            self.rejections.labels(reason)
        for phase in PHASES:
            for reason in ("cancelled", "expired"):
                self.abandoned.labels(reason, phase)
        for phase in ("header", "payload", "result"):
            self.stalled.labels(phase)
        self._http: tuple[WSGIServer, threading.Thread] | None = None

    def observe_batch(self, requests: int, elements: int) -> None:
        self._batch_requests.observe(requests)
        self._batch_elements.observe(elements)
        self.elements.inc(elements)

    def describe(self, **build: str) -> None:
        """Sets the labels of ``lovasz_build_info``."""
        self._build.info(build)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Declares a gauge that is read when it is scraped."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def serve(self, host: str, port: int) -> int:
        """Starts the HTTP server; returns its port.

        Raises:
            OSError: the address cannot be bound.
        """
        self._http = start_http_server(port, host, registry=self.registry)
        return int(self._http[0].server_port)

    def stop(self) -> None:
        if self._http is not None:
            server, thread = self._http
            server.shutdown()
            server.server_close()
            thread.join()
            self._http = None
