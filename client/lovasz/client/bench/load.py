"""The load: sends a workload's requests from many threads, and measures them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress

from lovasz.client.access import Access
from lovasz.client.bench.measurement import Failure, Measurement, Phase, Progress, Record, Sample
from lovasz.client.bench.workload import Workload
from lovasz.client.client import LossClient
from lovasz.client.errors import (
    AuthenticationError,
    CallCancelledError,
    IncompatibleServerError,
    InvalidInputError,
    LossError,
    ServerUnavailableError,
    TLSError,
)
from lovasz.client.options import DEFAULT_TIMEOUT_SECONDS
from lovasz.client.tensors import HOST, Array, on_device

DEFAULT_DURATION_SECONDS = 5.0
DEFAULT_WARMUP_SECONDS = 1.0

_WATCH_SECONDS = 0.25
_GRACE_SECONDS = 2.0
"""How long requests under way may take after Ctrl-C before their connections are closed."""

_PERMANENT = (
    InvalidInputError,
    ServerUnavailableError,
    IncompatibleServerError,
    AuthenticationError,
    TLSError,
)
"""Errors of the first request that all later ones would have, too."""


def measure(
    target: str,
    workload: Workload,
    *,
    duration_seconds: float = DEFAULT_DURATION_SECONDS,
    warmup_seconds: float = DEFAULT_WARMUP_SECONDS,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    access: Access | None = None,
    device: str = HOST,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Measurement:
    """Sends a workload's requests, each thread one after another, until the time is up; waits for those under way.

    The first request is sent alone. It is not measured, nor are those of the warm-up. Ctrl-C ends the load early: the
    measurement then holds what was measured before.

    Args:
        target: as :class:`LossClient` takes it.
        workload: what is sent.
        duration_seconds: for how long requests are measured.
        warmup_seconds: for how long requests are sent before that.
        timeout_seconds: for each request.
        access: TLS and token; None: neither.
        device: where the tensors are, as torch names it; ``"cpu"``: arrays of NumPy.
        watch: called a few times a second, in this thread.

    Raises:
        ValueError: the target, the timeout or the device is invalid.
        LossError: the first request failed as all others would: InvalidInputError, ServerUnavailableError,
            IncompatibleServerError, AuthenticationError or TLSError.
    """
    logits, labels = (array if device == HOST else on_device(array, device) for array in workload.tensors())
    before, measured = Record(), Record()
    interrupted = False
    with ExitStack() as connections, ThreadPoolExecutor(workload.concurrency, "lovasz-load") as threads:
        load = _Load(workload, logits, labels, threads, watch)
        try:
            for _ in range(workload.concurrency):
                load.clients.append(
                    connections.enter_context(workload.client(target, timeout_seconds, access or Access()))
                )
            load.send_first(before)
            if warmup_seconds > 0:
                load.send(Phase.WARMUP, warmup_seconds, before)
            load.send(Phase.MEASURED, duration_seconds, measured)
        except KeyboardInterrupt:
            interrupted = True
            load.stop()
            connections.close()  # Ends the requests that are still under way.
        except BaseException:
            load.stopping = True
            raise
    return measured.measurement(workload, before.requests + len(before.failures), interrupted)


class _Load:
    """The clients of a workload, and the threads in which they send."""

    def __init__(
        self,
        workload: Workload,
        logits: Array,
        labels: Array,
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

    def send_first(self, record: Record) -> None:
        """Sends one request, in this thread."""
        self._watch(record.progress(Phase.FIRST))
        error = self._send_one(self.clients[0], record)
        if isinstance(error, _PERMANENT):
            raise error

    def send(self, phase: Phase, seconds: float, record: Record) -> None:
        """Lets every client send for ``seconds``, and returns when all are done."""
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
        """Sends no further requests; waits a little for those under way, or until Ctrl-C is pressed again."""
        self.stopping = True
        with suppress(KeyboardInterrupt):
            wait(self._sending, _GRACE_SECONDS)

    def _send_until(self, until: float, client: LossClient, record: Record) -> None:
        while not self.stopping:
            self._send_one(client, record)
            if time.perf_counter() >= until:
                break

    def _send_one(self, client: LossClient, record: Record) -> LossError | None:
        """Returns the request's error, if it failed."""
        workload = self._workload
        failed = None
        started = time.perf_counter()
        try:
            result = client.compute(self._logits, self._labels, workload.loss, want_grad=workload.want_grad)
            record.samples.append(Sample(time.perf_counter() - started, result.timing))
        except LossError as error:
            if self.stopping and isinstance(error, CallCancelledError):
                return error  # Its client was closed.
            record.failures.append(Failure(type(error).__name__, str(error)))
            failed = error
        record.ended = time.perf_counter()
        return failed
