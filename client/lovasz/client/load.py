"""A load on a server: synthetic requests, the threads that send them, and the figures of what came back."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lovasz import spec, wire
from lovasz.client.client import DEFAULT_TIMEOUT_SECONDS, LossClient
from lovasz.client.errors import (
    CallCancelledError,
    IncompatibleServerError,
    InvalidInputError,
    LossError,
    ServerUnavailableError,
)

DEFAULT_TRANSPORT = "auto"
DEFAULT_DTYPE = "float32"
DEFAULT_DURATION_SECONDS = 5.0
DEFAULT_WARMUP_SECONDS = 1.0

_SEED = 2018
_SHARE_RIGHT = 0.8
_CONFIDENCE = 3.0
"""How far the right class's logit stands out where the imagined network is right; the noise has deviation 1."""

_WATCH_SECONDS = 0.25
_RECENT_REQUESTS = 500
"""So many of the last requests make the current median: a longer list would take the interpreter from the clients."""
_GRACE_SECONDS = 2.0
"""How long requests under way may take after Ctrl-C before their connections are closed."""

_LASTING = (InvalidInputError, ServerUnavailableError, IncompatibleServerError)
"""What a first request ends with that later ones would end with as well."""


def loss_for(kind: str, shape: tuple[int, ...]) -> spec.Loss:
    """The loss of this kind with its usual options; the hinge is multilabel if the shape has several channels.

    Raises:
        InvalidInput: no such kind.
    """
    if kind == "lovasz_softmax":
        return spec.LovaszSoftmax()
    if kind == "lovasz_hinge":
        return spec.LovaszHinge(multilabel=len(shape) > 1 and shape[1] > 1)
    if kind == "cross_entropy":
        return spec.CrossEntropy()
    raise spec.InvalidInput("loss", f"got {kind!r}; expected one of {', '.join(spec.LOSS_KINDS)}")


@dataclass(frozen=True)
class Workload:
    """What is sent, how, and by how many at a time.

    Attributes:
        shape: of the logits, (N, C, *spatial).
        loss: what is asked for.
        dtype: in which the logits travel: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        transport: as :class:`LossClient` takes it.
        concurrency: threads, each with a client of its own.
        want_grad: whether the gradient is asked for, too.

    Raises:
        InvalidInput: a shape that does not fit the loss.
    """

    shape: tuple[int, ...]
    loss: spec.Loss
    dtype: str = DEFAULT_DTYPE
    transport: str = DEFAULT_TRANSPORT
    concurrency: int = 1
    want_grad: bool = True
    label_values: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        layout = spec.weighted_sum(self.loss).layout(self.shape, self.label_shape)
        object.__setattr__(self, "label_values", layout.label_values)

    @property
    def label_shape(self) -> tuple[int, ...]:
        multilabel = isinstance(self.loss, spec.LovaszHinge) and self.loss.multilabel
        return self.shape if multilabel else (*self.shape[:1], *self.shape[2:])

    @property
    def label_dtype(self) -> wire.DType:
        """uint8 for up to 256 classes."""
        fitting = (d for d in wire.DTYPES if not d.is_float and np.iinfo(d.name).max >= self.label_values - 1)
        return next(fitting)

    @property
    def payload_bytes(self) -> int:
        """Of one request, up and down: logits, labels and gradient."""
        logits = math.prod(self.shape) * wire.dtype_named(self.dtype).itemsize
        labels = math.prod(self.label_shape) * self.label_dtype.itemsize
        return logits * (2 if self.want_grad else 1) + labels

    def tensors(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
        """Logits as of a network half trained, and labels: noise, and 3 more for the right class at 80 % of the pixels.

        The same for the same shape and loss, whatever else differs.
        """
        random = np.random.default_rng(_SEED)
        logits = random.standard_normal(self.shape, np.float32)
        labels = random.integers(self.label_values, size=self.label_shape).astype(self.label_dtype.numpy)
        right = random.random(self.label_shape, np.float32) < _SHARE_RIGHT
        lead = np.where(right, np.float32(_CONFIDENCE), np.float32(0))
        if isinstance(self.loss, spec.LovaszHinge):
            logits += np.where(labels == 1, lead, -lead).reshape(self.shape)
        else:
            index = labels[:, None].astype(np.intp)
            led = np.take_along_axis(logits, index, axis=1) + lead[:, None]
            np.put_along_axis(logits, index, led, axis=1)
        return logits, labels

    def client(self, target: str, timeout_seconds: float) -> LossClient:
        """Raises:
        ValueError: a target, timeout, transport or dtype that cannot be.
        """
        wire_dtype = None if self.dtype == DEFAULT_DTYPE else self.dtype  # The logits are of the default one.
        return LossClient(target, timeout=timeout_seconds, transport=self.transport, wire_dtype=wire_dtype)


class Phase(Enum):
    """Where a measurement stands."""

    FIRST = "first request"
    WARMUP = "warming up"
    MEASURED = "measuring"


@dataclass(frozen=True)
class Progress:
    """A look at a phase under way.

    Attributes:
        requests: answered in this phase so far.
        errors: requests of this phase that failed.
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
    """Medians of where the server says that a request's time went, and the rest of the client's median.

    Attributes:
        other_seconds: the client's median less the four others: encoding, transport down, decoding. Medians do not
            add up exactly, so that it can come out a little below 0.
    """

    receive_seconds: float
    queue_seconds: float
    compute_seconds: float
    copy_seconds: float
    other_seconds: float


@dataclass(frozen=True)
class Failures:
    """Requests that failed in one way: the error's name, how often, and the text of the first."""

    kind: str
    count: int
    first: str


@dataclass(frozen=True)
class Measurement:
    """What came of a workload. Figures of nothing are NaN.

    Attributes:
        elapsed_seconds: from the first measured request's start to the last one's end.
        warmup_requests: requests that ended before, well or not.
        latency_seconds: float64, one of each measured request that was answered.
        mean_batch_requests: how many requests shared a request's batch on the server, itself included.
        interrupted: Ctrl-C came before its time was up.
    """

    workload: Workload
    elapsed_seconds: float
    warmup_requests: int
    latency_seconds: npt.NDArray[np.float64]
    split: Split
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
        return self.requests_per_second * self.workload.payload_bytes / 2**20

    def latency_quantile(self, share: float) -> float:
        """In seconds; ``share`` in [0, 1]."""
        return float(np.quantile(self.latency_seconds, share)) if self.requests else math.nan


def measure(
    target: str,
    workload: Workload,
    *,
    duration_seconds: float = DEFAULT_DURATION_SECONDS,
    warmup_seconds: float = DEFAULT_WARMUP_SECONDS,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Measurement:
    """Sends a workload's requests, each thread one after another, until the time is up; waits for those under way.

    One request goes ahead alone and is not measured; nor are those of the warm-up. Ctrl-C ends it early: the
    measurement then holds what was measured before.

    Args:
        watch: is called a few times a second, in this thread.

    Raises:
        ValueError: the client cannot be made so.
        LossError: the first request failed as all would: InvalidInputError, ServerUnavailableError or
            IncompatibleServerError.
    """
    logits, labels = workload.tensors()
    before, measured = _Record(), _Record()
    interrupted = False
    with ExitStack() as connections, ThreadPoolExecutor(workload.concurrency, "lovasz-load") as threads:
        load = _Load(workload, logits, labels, threads, watch)
        try:
            for _ in range(workload.concurrency):
                load.clients.append(connections.enter_context(workload.client(target, timeout_seconds)))
            load.send_first(before)
            if warmup_seconds > 0:
                load.send(Phase.WARMUP, warmup_seconds, before)
            load.send(Phase.MEASURED, duration_seconds, measured)
        except KeyboardInterrupt:
            interrupted = True
            load.stop()
            connections.close()  # Ends what is still under way.
        except BaseException:
            load.stopping = True
            raise
    return measured.measurement(workload, before.requests + len(before.failures), interrupted)


class _Sample(NamedTuple):
    seconds: float
    timing: spec.Timing | None


class _Failure(NamedTuple):
    """Not the error itself, whose traceback would keep the request's tensors."""

    kind: str
    text: str


@dataclass
class _Record:
    """What the threads of a phase saw. They append only, which needs no lock."""

    started: float = field(default_factory=time.perf_counter)
    ended: float = 0.0
    samples: list[_Sample] = field(default_factory=list)
    failures: list[_Failure] = field(default_factory=list)

    @property
    def requests(self) -> int:
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
            mean_batch_requests=statistics.fmean(t.batch_requests for t in timings) if timings else math.nan,
            failures=tuple(Failures(kind, count, firsts[kind]) for kind, count in counts.most_common()),
            interrupted=interrupted,
        )


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else math.nan


class _Load:
    """The clients of a workload, and the threads in which they send."""

    def __init__(
        self,
        workload: Workload,
        logits: npt.NDArray[np.float32],
        labels: npt.NDArray[Any],
        threads: ThreadPoolExecutor,
        watch: Callable[[Progress], None],
    ) -> None:
        self.clients: list[LossClient] = []
        self.stopping = False
        self._workload = workload
        self._logits = logits
        self._labels = labels
        self._threads = threads
        self._watch = watch
        self._sending: list[Future[None]] = []

    def send_first(self, record: _Record) -> None:
        """Sends one request, in this thread."""
        self._watch(record.progress(Phase.FIRST))
        error = self._send_one(self.clients[0], record)
        if isinstance(error, _LASTING):
            raise error

    def send(self, phase: Phase, seconds: float, record: _Record) -> None:
        """Lets every client send for so long, and returns when all are done."""
        record.started = time.perf_counter()
        until = record.started + seconds
        self._sending = [self._threads.submit(self._send_until, until, client, record) for client in self.clients]
        pending = set(self._sending)
        while pending:
            self._watch(record.progress(phase))
            done, pending = wait(pending, _WATCH_SECONDS, FIRST_EXCEPTION)
            for ended in done:
                ended.result()

    def stop(self) -> None:
        """Lets nobody send another request, and waits a little for those under way, or until Ctrl-C is repeated."""
        self.stopping = True
        with suppress(KeyboardInterrupt):
            wait(self._sending, _GRACE_SECONDS)

    def _send_until(self, until: float, client: LossClient, record: _Record) -> None:
        while not self.stopping:
            self._send_one(client, record)
            if time.perf_counter() >= until:
                break

    def _send_one(self, client: LossClient, record: _Record) -> LossError | None:
        """Returns what it failed with."""
        workload = self._workload
        failed = None
        started = time.perf_counter()
        try:
            result = client.compute(self._logits, self._labels, workload.loss, want_grad=workload.want_grad)
            record.samples.append(_Sample(time.perf_counter() - started, result.timing))
        except LossError as error:
            if self.stopping and isinstance(error, CallCancelledError):
                return error  # Its client was closed.
            record.failures.append(_Failure(type(error).__name__, str(error)))
            failed = error
        record.ended = time.perf_counter()
        return failed
