"""Every metric of the server, declared here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
)

from lovasz.server.config import DEFAULT_MAX_RUNS
from lovasz.server.runs import Runs

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PHASES = ("header", "payload", "joint", "queue", "compute", "result")
"""What a request goes through, for what ends in one of them."""
_ELEMENTS = tuple(float(4**k) for k in range(5, 17))
_BYTES = tuple(float(4**k) for k in range(5, 17))
"""1 KiB to 4 GiB."""

GAUGES = {
    "lovasz_queue_requests": "Requests waiting for the device.",
    "lovasz_in_flight_requests": "Requests held.",
    "lovasz_max_requests": "Requests held at most.",
    "lovasz_in_flight_bytes": "Tensor bytes of the requests held, with their gradients.",
    "lovasz_budget_bytes": "Tensor bytes held at most.",
    "lovasz_staging_idle_bytes": "Memory kept for the tensors of the next requests.",
    "lovasz_shared_memory_sessions": "Processes on this host that share memory with the server.",
    "lovasz_shared_memory_bytes": "Memory that processes on this host share with the server; it is theirs.",
    "lovasz_joint_groups_waiting": "Joint steps that wait for ranks.",
    "lovasz_joint_ranks_waiting": "Ranks that have come to joint steps that wait for others.",
    "lovasz_joint_answers_kept": "Answers kept for ranks that lost them.",
    "lovasz_device_healthy": "1 if the device answers.",
    "lovasz_device_utilization_ratio": "Share of the time in which the GPU, or for a CPU the host's processors, had "
    "work, whoever's; NaN where that is not known (for GPUs without nvidia-ml-py).",
    "lovasz_device_memory_used_bytes": "Memory of the GPU, or of the host for a CPU, that any process has taken.",
    "lovasz_device_memory_bytes": "Memory of the GPU, or of the host for a CPU; 0 where the system does not say.",
}
"""Those that are read when they are scraped."""


class Metrics:
    """The server's metrics, in a registry of their own.

    Attributes:
        runs: the loss and IoU of trainings, at most ``max_runs`` of them.
    """

    def __init__(self, max_runs: int = DEFAULT_MAX_RUNS) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.runs = Runs(max_runs)
        registry.register(self.runs)
        self.requests = Counter(
            "lovasz_requests",
            "Requests answered, by method, kind of loss and gRPC status code.",
            ["method", "loss", "code"],
            registry=registry,
        )
        self.phase_seconds = Histogram(
            "lovasz_phase_seconds",
            "Time that a request spent in each phase: receive, joint (waiting for other ranks), queue, compute (of its "
            "batch), copy (of its batch's gradients to the host), send; also in the phase in which it failed.",
            ["phase"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.faults = Counter("lovasz_faults", "Requests that failed by a fault of the server.", registry=registry)
        self.request_bytes = Histogram(
            "lovasz_request_bytes",
            "Tensor bytes of the requests that were computed, without their gradients.",
            buckets=_BYTES,
            registry=registry,
        )
        self.rejections = Counter(
            "lovasz_rejections",
            "Requests refused, by reason; all but invalid and some too_large at their header.",
            ["reason"],
            registry=registry,
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
            "Joint steps that ended: completed, or broken as ranks were missing until the timeout, left, had no room, "
            "or the server was stopping.",
            ["outcome"],
            registry=registry,
        )
        self.device_busy_seconds = Counter(
            "lovasz_device_busy_seconds", "Time in which the device had a batch to compute.", registry=registry
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
        for phase in ("receive", "joint", "queue", "compute", "copy", "send"):
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

    def observe_batch(self, requests: int, elements: int) -> None:
        self._batch_requests.observe(requests)
        self._batch_elements.observe(elements)
        self.elements.inc(elements)

    def describe(self, **build: str) -> None:
        """Sets the labels of ``lovasz_build_info``."""
        self._build.info(build)

    def watch(self, readers: Mapping[str, Callable[[], float]]) -> None:
        """Declares :data:`GAUGES`, each with what it is read from."""
        assert readers.keys() == GAUGES.keys()
        for name, text in GAUGES.items():
            Gauge(name, text, registry=self.registry).set_function(readers[name])
