"""Every metric of the server, declared here."""

from __future__ import annotations

import enum
import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Container, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Info, ProcessCollector

from lovasz.server.config import DEFAULT_MAX_RUNS
from lovasz.server.observe.runs import Runs
from lovasz.server.observe.shares import Shares
from lovasz.server.observe.tallies import Tallies

_log = logging.getLogger(__name__)


class Phase(enum.Enum):
    """What a request goes through, in this order."""

    __hash__ = object.__hash__  # Enum's own is a function of Python, and each request counts its phases in tables.

    RECEIVE = "receive"
    """Header and payload."""
    JOINT = "joint"
    """Waiting for the other ranks of its step."""
    QUEUE = "queue"
    """Waiting for the device."""
    COMPUTE = "compute"
    """Its batch."""
    COPY = "copy"
    """The copy of the batch's gradients to the host."""
    SEND = "send"
    """Its answer. One of one message is sent when gRPC has taken it: the network is left out."""


class JointOutcome(enum.Enum):
    """How a joint step ended."""

    COMPLETED = "completed"
    TIMEOUT = "timeout"
    LEFT = "left"
    OVERLOADED = "overloaded"
    STOPPING = "stopping"
    ABORTED = "aborted"
    OUT_OF_STEP = "out_of_step"
    REGROUPED = "regrouped"


class Rejection(enum.Enum):
    """Why a request was refused."""

    NO_BYTES = "no_bytes"
    NO_REQUESTS = "no_requests"
    NAME_LIMIT = "name_limit"
    TOO_LARGE = "too_large"
    STARTING = "starting"
    STOPPING = "stopping"
    INVALID = "invalid"
    MISMATCH = "mismatch"
    CONFLICT = "conflict"
    UNAUTHENTICATED = "unauthenticated"


class Abandonment(enum.Enum):
    """Why a request was given up before its answer was sent."""

    CANCELLED = "cancelled"
    EXPIRED = "expired"


SHARED_MEMORY = "SharedMemory"
"""What metrics and log call the method of calls over the shared-memory socket."""
LOSS_METHODS = ("Compute", "ComputeStream", SHARED_MEMORY)
"""The methods whose calls have a loss."""
PHASES = tuple(phase.value for phase in Phase)
CLASSES = ("0", "0.01", "0.1", "1", "10")
"""Classes of requests by how long they take. Each is named by its lower limit in seconds."""

_CLASS_STARTS = tuple(map(float, CLASSES))
_OUTCOMES = {True: "answered", False: "failed"}
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 50, 60, 120, 300, 1800)
_REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_ELEMENTS = tuple(float(4**k) for k in range(5, 17))
_BYTES = tuple(float(2**k) for k in range(10, 33))
"""1 KiB to 4 GiB."""

GAUGES = {
    "lovasz_queue_requests": "Requests waiting for the device.",
    "lovasz_in_flight_requests": "Requests in flight.",
    "lovasz_max_requests": "The most requests that may be in flight at a time (--max-requests).",
    "lovasz_in_flight_bytes": "Tensor bytes of the requests in flight, with their gradients.",
    "lovasz_budget_bytes": "The most tensor bytes that may be in flight at a time (--memory-budget).",
    "lovasz_staging_idle_bytes": "Memory kept for the tensors of the next requests.",
    "lovasz_shared_memory_sessions": "Processes on this host that share memory with the server.",
    "lovasz_shared_memory_bytes": "Memory that processes on this host share with the server; it belongs to them.",
    "lovasz_shared_device_memory_bytes": "The part of lovasz_shared_memory_bytes that is GPU memory.",
    "lovasz_joint_groups_waiting": "Joint steps that wait for ranks.",
    "lovasz_joint_ranks_waiting": "Ranks that wait for the other ranks of their joint step.",
    "lovasz_joint_answers_kept": "Answers of joint steps, kept for ranks that may lose theirs and call again.",
    "lovasz_starting": "1 while the server starts: it compiles, and refuses losses. 0 from then on.",
    "lovasz_device_healthy": "1 if the device gave the right answer when last checked, and is not stuck.",
    "lovasz_access_files_valid": "0 if changed files of certificates or tokens cannot be used: the server goes on with "
    "their old contents. Else 1.",
    "lovasz_device_utilization_ratio": "Share of the time in which the GPU (for a CPU: the host's processors) had "
    "work of any process; NaN if unknown (GPUs without nvidia-ml-py).",
    "lovasz_device_memory_used_bytes": "Memory of the GPU (for a CPU: of the host, or of the container if it "
    "has a limit) that is used by any process; NaN if unknown.",
    "lovasz_device_memory_bytes": "Memory of the GPU (for a CPU: of the host, or the container's limit if that is "
    "lower); NaN if unknown.",
}
"""The gauges that are read each time that they are scraped, with their help texts."""


class Metrics:
    """The server's metrics, in a registry of their own.

    Attributes:
        runs: the loss and IoU of trainings, at most ``max_runs`` of them.
        shares: the device's time by caller, for as many of them.
    """

    def __init__(self, max_runs: int = DEFAULT_MAX_RUNS) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.runs = Runs(max_runs)
        self.shares = Shares(max_runs)
        registry.register(self.runs)
        registry.register(self.shares)
        tallies = Tallies(registry)
        self._lock = tallies.lock
        self.requests = tallies.counter(
            "lovasz_requests",
            "Requests answered, by method, kind of loss and gRPC status code.",
            ["method", "loss", "code"],
        )
        self._caller_requests = tallies.counter(
            "lovasz_caller_requests",
            "Requests answered, by the name of the caller's token (`alice`) and gRPC status code; with --tokens only.",
            ["caller", "code"],
        )
        phase_seconds = tallies.histogram(
            "lovasz_phase_seconds",
            "Time that each admitted request spent in each phase, including the phase in which it failed.",
            ["phase"],
            buckets=_SECONDS,
        )
        request_seconds = tallies.histogram(
            "lovasz_request_seconds",
            "Time of each admitted request, from the start of its call to the end of its answer (in one message: until "
            "gRPC has taken it), or to its failure; the outcome is answered or failed.",
            ["outcome"],
            buckets=_SECONDS,
        )
        class_seconds = tallies.counter(
            "lovasz_class_phase_seconds",
            "Time spent in each phase by the requests of a class. A class has the requests that took more than `over` "
            "seconds in total, up to the limit of the next class.",
            ["over", "phase"],
        )
        class_requests = tallies.counter(
            "lovasz_class_requests", "Requests in each class of lovasz_class_phase_seconds_total.", ["over"]
        )
        self.faults = Counter(
            "lovasz_faults", "Requests that failed because of a fault in the server.", registry=registry
        )
        self._request_bytes = tallies.histogram(
            "lovasz_request_bytes",
            "Tensor bytes of the requests that were computed, without their gradients.",
            buckets=_BYTES,
        ).series()
        self.rejections = Counter(
            "lovasz_rejections",
            "Requests refused, by reason: no_bytes and no_requests mean that there was no room; name_limit means that "
            "the caller's name has used up its share (--tokens). All are refused at their header, except invalid ones "
            "and some that are too_large.",
            ["reason"],
            registry=registry,
        )
        self.abandoned = Counter(
            "lovasz_abandoned",
            "Requests that were abandoned before their answer was sent, because their caller cancelled them or their "
            "deadline passed, by the phase that they were in.",
            ["reason", "phase"],
            registry=registry,
        )
        self.stalled = Counter(
            "lovasz_stalled",
            "Calls cut off because their caller stopped sending its request (receive) or reading its answer (send).",
            ["phase"],
            registry=registry,
        )
        self.joint_groups = Counter(
            "lovasz_joint_groups",
            "Joint steps that ended: completed; or not, because ranks were missing at the timeout (timeout), all ranks "
            "ended their calls (left), there was no room (overloaded), the server was stopping (stopping), a "
            "rank could not take part (aborted), the ranks were asked to call again (regrouped), or they waited for "
            "each other at different steps (out_of_step).",
            ["outcome"],
            registry=registry,
        )
        self._device_busy_seconds = tallies.counter(
            "lovasz_device_busy_seconds", "Time during which the device had a batch to compute."
        ).series()
        self._elements = tallies.counter("lovasz_elements", "Logits computed.").series()
        self.nonfinite_results = Counter(
            "lovasz_nonfinite_results", "Answers that were NaN because the logits were not finite.", registry=registry
        )
        self._batch_requests = tallies.histogram(
            "lovasz_batch_requests", "Requests computed in one batch.", buckets=_REQUESTS
        ).series()
        self._batch_elements = tallies.histogram(
            "lovasz_batch_elements", "Logits computed in one batch.", buckets=_ELEMENTS
        ).series()
        self._labels: dict[str, str] = {}
        self._build = Info("lovasz_build", "The server's version and what it runs on.", registry=registry)
        self._phases = {
            phase: (
                phase_seconds.series(phase.value),
                [class_seconds.series(over, phase.value) for over in CLASSES],
            )
            for phase in Phase
        }
        self._classes = [class_requests.series(over) for over in CLASSES]
        self._outcomes = {answered: request_seconds.series(name) for answered, name in _OUTCOMES.items()}
        # Counters begin at 0: Prometheus sees no rise in one that begins at its first event.
        for outcome in JointOutcome:
            self.joint_groups.labels(outcome.value)
        for rejection in Rejection:
            self.rejections.labels(rejection.value)
        for phase in Phase:
            for reason in Abandonment:
                self.abandoned.labels(reason.value, phase.value)
        for phase in (Phase.RECEIVE, Phase.SEND):
            self.stalled.labels(phase.value)

    def count_request(self, method: str, loss: str, code: str) -> None:
        """Counts a request that ended."""
        counter = self.requests.series(method, loss, code)
        with self._lock:
            counter.value += 1

    def count_unread(self, method: str, code: str, rejection: Rejection, caller: str = "") -> None:
        """Counts a request that is refused before its header is read.

        Args:
            caller: the name of the caller's token; empty: it has none.
        """
        self.count_request(method, unread_loss(method), code)
        self.rejections.labels(rejection.value).inc()
        if caller:
            self.count_caller(caller, code)

    def count_caller(self, name: str, code: str) -> None:
        """Counts a request of the caller whose token has this name."""
        counter = self._caller_requests.series(name, code)
        with self._lock:
            counter.value += 1

    def keep_callers(self, names: Container[str]) -> None:
        """Forgets callers of other names."""
        self._caller_requests.keep(lambda name, code: name in names)

    def observe_answer(self, payload_bytes: int) -> None:
        """Records a request that was computed."""
        with self._lock:
            self._request_bytes.add(payload_bytes)

    def observe_request(
        self, phases: Mapping[Phase, float], seconds: float, answered: bool, trace: dict[str, str] | None
    ) -> None:
        """Records an admitted request.

        Args:
            phases: seconds spent in each phase that the request reached.
            seconds: in total.
            answered: whether it was answered, and did not fail.
            trace: from ``tracing.exemplar``.
        """
        place = max(0, bisect_left(_CLASS_STARTS, seconds) - 1)
        with self._lock:
            self._outcomes[answered].add(seconds, trace)
            self._classes[place].value += 1
            for phase, spent in phases.items():
                distribution, classes = self._phases[phase]
                distribution.add(spent, trace)
                classes[place].value += spent

    def observe_batch(self, requests: int, elements: int, busy_seconds: float) -> None:
        """Records a batch that was computed.

        Args:
            busy_seconds: how long the device had this batch, and no earlier one, to compute.
        """
        with self._lock:
            self._batch_requests.add(requests)
            self._batch_elements.add(elements)
            self._elements.value += elements
            self._device_busy_seconds.value += busy_seconds

    def describe(self, **build: str) -> None:
        """Adds labels to ``lovasz_build_info``."""
        self._labels |= build
        self._build.info(self._labels)

    def watch(self, readers: Mapping[str, Callable[[], float]]) -> None:
        """Declares :data:`GAUGES`, each with the function that reads it."""
        assert readers.keys() == GAUGES.keys()
        for name, text in GAUGES.items():
            Gauge(name, text, registry=self.registry).set_function(_readable(readers[name]))


def unread_loss(method: str) -> str:
    """What counts as the kind of a call's loss before its header is read."""
    return "unknown" if method in LOSS_METHODS else "none"


def _readable(read: Callable[[], float]) -> Callable[[], float]:
    """Reads NaN if a reader fails, as the other gauges are needed all the more then."""

    def value() -> float:
        try:
            return read()
        except Exception:
            _log.exception("a gauge cannot be read")
            return math.nan

    return value
