"""What a load found out: the samples that its threads record, and the figures computed from them."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lovasz import spec
from lovasz.client.bench.workload import Workload

_RECENT_REQUESTS = 500
"""The current median is that of this many last requests: more would take interpreter time from the clients."""


class Phase(Enum):
    """The phases of a measurement, in order."""

    FIRST = "first request"
    WARMUP = "warming up"
    MEASURED = "measuring"


@dataclass(frozen=True)
class Progress:
    """The state of a phase that is under way.

    Attributes:
        requests: requests of this phase that were answered so far.
        errors: requests of this phase that failed so far.
        p50_seconds: median latency of the last few hundred requests; NaN before the first.
    """

    phase: Phase
    elapsed_seconds: float
    requests: int
    errors: int
    p50_seconds: float

    @property
    def requests_per_second(self) -> float:
        return self.requests / self.elapsed_seconds if self.elapsed_seconds > 0 else 0.0


@dataclass(frozen=True)
class Split:
    """Where the time of a request goes: medians that the server reports, and the rest of the client's median.

    Attributes:
        other_seconds: the client's median minus the four others: encoding, transport, decoding. Medians do not add up
            exactly, so it can be slightly below 0.
    """

    receive_seconds: float
    queue_seconds: float
    compute_seconds: float
    copy_seconds: float
    other_seconds: float


@dataclass(frozen=True)
class Failures:
    """Requests that failed with the same error: its name, their number, and the text of the first."""

    kind: str
    count: int
    first: str


@dataclass(frozen=True)
class Measurement:
    """The figures of a workload; NaN where there is no data.

    Attributes:
        elapsed_seconds: from the start of the first measured request to the end of the last.
        warmup_requests: requests before that, answered or failed.
        latency_seconds: float64, one for each measured request that was answered.
        way: that most requests took (``spec.Timing.transport``); empty if none was answered.
        mean_batch_requests: how many requests shared a batch on the server, on average over the requests.
        interrupted: whether Ctrl-C ended it early.
    """

    workload: Workload
    elapsed_seconds: float
    warmup_requests: int
    latency_seconds: npt.NDArray[np.float64]
    split: Split
    way: str
    mean_batch_requests: float
    failures: tuple[Failures, ...]
    interrupted: bool

    @property
    def requests(self) -> int:
        """Measured requests that were answered."""
        return int(self.latency_seconds.size)

    @property
    def errors(self) -> int:
        """Measured requests that failed."""
        return sum(failures.count for failures in self.failures)

    @property
    def requests_per_second(self) -> float:
        return self.requests / self.elapsed_seconds if self.requests else 0.0

    @property
    def mib_per_second(self) -> float:
        """Tensors of answered requests in both directions."""
        return self.requests_per_second * self.workload.payload_bytes / 2**20

    def latency_quantile(self, share: float) -> float:
        """In seconds; ``share`` in [0, 1]."""
        return float(np.quantile(self.latency_seconds, share)) if self.requests else math.nan


class Sample(NamedTuple):
    """A request that was answered: its latency, and where the server spent its time."""

    seconds: float
    timing: spec.Timing | None


class Failure(NamedTuple):
    """A request that failed: the error's name and text. The error itself would keep the request's tensors alive."""

    kind: str
    text: str


@dataclass
class Record:
    """What the threads of a phase record. They only append, which needs no lock."""

    started: float = field(default_factory=time.perf_counter)
    ended: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """Requests that were answered."""
        return len(self.samples)

    def progress(self, phase: Phase) -> Progress:
        recent = [sample.seconds for sample in self.samples[-_RECENT_REQUESTS:]]
        return Progress(phase, time.perf_counter() - self.started, self.requests, len(self.failures), _median(recent))

    def measurement(self, workload: Workload, warmup_requests: int, interrupted: bool) -> Measurement:
        latency = np.array([sample.seconds for sample in self.samples], np.float64)
        timings = [sample.timing for sample in self.samples if sample.timing is not None]
        receive = _median([timing.receive_seconds for timing in timings])
        queue = _median([timing.queue_seconds for timing in timings])
        compute = _median([timing.compute_seconds for timing in timings])
        copy = _median([timing.copy_seconds for timing in timings])
        other = _median([sample.seconds for sample in self.samples]) - receive - queue - compute - copy
        counts = Counter(failure.kind for failure in self.failures)
        firsts = {failure.kind: failure.text for failure in reversed(self.failures)}
        return Measurement(
            workload=workload,
            elapsed_seconds=max(0.0, self.ended - self.started),
            warmup_requests=warmup_requests,
            latency_seconds=latency,
            split=Split(receive, queue, compute, copy, other),
            way=Counter(timing.transport for timing in timings).most_common(1)[0][0] if timings else "",
            mean_batch_requests=statistics.fmean(t.batch_requests for t in timings) if timings else math.nan,
            failures=tuple(Failures(kind, count, firsts[kind]) for kind, count in counts.most_common()),
            interrupted=interrupted,
        )


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else math.nan
