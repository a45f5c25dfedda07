"""Owns a device: takes batches, computes them, delivers the answers, and checks the device."""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

import torch

from lovasz.core.answers import Answer as CoreAnswer
from lovasz.core.answers import JointFault, Pending
from lovasz.core.dispatch import advice, installed, submit, warm_up
from lovasz.core.stop import Stop, Stopped
from lovasz.server.device.gradients import to_callers
from lovasz.server.device.kept_memory import KeptMemory
from lovasz.server.device.self_test import SelfTest
from lovasz.server.errors import AbandonedError, DeviceError, JointBrokenError, TooLargeError
from lovasz.server.memory.exhaustion import is_out_of_memory
from lovasz.server.observe.metrics import Metrics
from lovasz.server.schedule.batcher import TURN_ELEMENTS, Batcher
from lovasz.server.schedule.job import Answer, Caller, Job
from lovasz.spec import InvalidInput

_log = logging.getLogger(__name__)

_MAX_COST_NOW = TURN_ELEMENTS["cpu"]
"""The largest job that the thread that brings it computes, in logits: about a millisecond."""
_MAX_QUICK_COST = 2 * _MAX_COST_NOW
"""The largest job that others of its connection wait for, where connections share the interpreter."""
_HERE = nullcontext()
"""Where work on a CPU goes."""


@dataclass(frozen=True)
class _Running:
    """A batch that was started on the device."""

    jobs: list[Job]
    callers: list[Caller]
    pending: Pending
    started: float
    stream: torch.cuda.Stream | None


class Engine:
    """Computes what its batcher holds, on one device, one batch at a time.

    It has a thread of its own. While a CPU is idle and no job waits, a small job is computed by the thread that brings
    it (:meth:`compute_now`), as handing it over to another thread and back takes as long as computing it.

    On a GPU a batch is started while the one before still runs, never more than one ahead. The two are on streams of
    their own, so that the answers of the first do not wait for the second.

    Attributes:
        busy_since: since when it uses the device, for a batch, its check or to free its memory (``time.monotonic``);
            None: it does not.
    """

    def __init__(
        self,
        device: torch.device,
        batcher: Batcher,
        metrics: Metrics,
        *,
        health_interval_seconds: float,
        stall_seconds: float,
    ) -> None:
        """Does not use the device yet.

        Args:
            health_interval_seconds: how often an idle device is checked.
            stall_seconds: how long one batch, or a check, may take before the device counts as unhealthy.
        """
        self.device = device
        self._batcher = batcher
        self._metrics = metrics
        self._health_interval_seconds = health_interval_seconds
        self._stall_seconds = stall_seconds
        on_gpu = device.type == "cuda"
        streams = [torch.cuda.Stream(device) for _ in range(2)] if on_gpu else [None]
        self._streams = itertools.cycle(streams)
        self._thread = threading.Thread(target=self._run, name=f"engine-{device}", daemon=True)
        # Torch's own loops would start further threads for each thread that calls them; Numba's have theirs.
        self._computes_now = device.type == "cpu" and installed("numba")
        self._using = threading.Lock()
        """Held by the thread that uses the device."""
        self.busy_since: float | None = None
        self._busy_until = -math.inf
        self._kept_memory = KeptMemory(device)
        self._held: tuple[Job, ...] = ()
        """The jobs that are being computed."""
        self._self_test = SelfTest(device)
        self._started = False

    def start(self) -> None:
        """Compiles what the device will run, checks the device, and starts the thread.

        Raises:
            DeviceError: the device fails, or computes wrongly.
        """
        hint = advice(self.device)
        if hint is not None:
            _log.warning(hint)
        device = {"device": str(self.device)}
        _log.info("compiling: a minute or two the first time, seconds later on", extra=device)
        since = time.monotonic()
        try:
            self._metrics.describe(backend=warm_up(self.device).value)
        except Exception as error:
            raise DeviceError(f"{self.device} cannot compute: {error}") from error
        _log.info("compiled", extra={**device, "seconds": round(time.monotonic() - since, 1)})
        self._self_test.run()
        if not self.passed_check:
            raise DeviceError(f"{self.device} did not compute a known loss; the log says why")
        self._thread.start()
        self._started = True

    def is_quick(self, cost: int) -> bool:
        """Whether a job of this cost takes so little of the device's time that the interpreter is the limit."""
        return self._computes_now and cost <= _MAX_QUICK_COST

    def has_large_job(self) -> bool:
        """Whether a job that is not quick waits or is being computed: a small one may have to wait for it."""
        return any(not self.is_quick(job.cost) for job in self._held) or not self.is_quick(self._batcher.largest_cost)

    def compute_now(self, job: Job) -> bool:
        """Computes a small job in this thread if a CPU is idle and no other job waits for it.

        A caller whose job gets stuck here hears of it when the process ends.

        Returns:
            Whether the job is done; False: it has to be queued.

        Raises:
            StoppingError: the queue is closed.
        """
        if not self._computes_now or job.cost > _MAX_COST_NOW or not self._using.acquire(blocking=False):
            return False
        try:
            if not self.passed_check or not self._batcher.pass_by(job):
                return False
            if job.claim():
                self._advance([job], None)
            return True
        finally:
            self._using.release()

    def stop(self, timeout_seconds: float) -> bool:
        """Computes what is queued, then ends the thread; True if that was done in time."""
        self._batcher.close()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def give_up(self) -> int:
        """The device is stuck: refuses all requests that wait for it, also those that it computes.

        Returns:
            How many there were.
        """
        held = [caller for caller in _callers(self._held) if not caller.answered]
        for caller in held:
            if caller.staging is not None:
                caller.staging.abandon()
        callers = [*_callers(self._batcher.take_all()), *held]
        for caller in callers:
            caller.refuse(self._no_answer())
        return len(callers)

    @property
    def starting(self) -> bool:
        """Whether :meth:`start` has not succeeded yet."""
        return not self._started

    @property
    def passed_check(self) -> bool:
        """Whether the device gave the right answers when it last had the memory for them."""
        return self._self_test.passed

    @property
    def healthy(self) -> bool:
        """Whether the device gave the right answer when it was last checked, and has not been stuck since."""
        since = self.busy_since
        return self._started and self.passed_check and (since is None or time.monotonic() - since < self._stall_seconds)

    def _run(self) -> None:
        running: _Running | None = None
        while running is not None or not self._batcher.finished:
            if running is None:
                self._batcher.wait(self._health_interval_seconds)
            with self._using:
                batch = self._batcher.take(idle=running is None)
                running = self._advance(batch, running)
                batch.clear()  # So that no tensors are held while waiting for the next batch.

    def _advance(self, batch: list[Job], running: _Running | None) -> _Running | None:
        """Starts a batch, finishes the one before, and returns the batch that runs then. Never raises."""
        try:
            running = self._step(batch, running)
        except Exception as error:
            _log.exception("a fault of the engine itself")
            for job in [*batch, *(running.jobs if running else ())]:
                job.refuse(error)
            running = None
        self._held = tuple(running.jobs) if running else ()
        self.busy_since = time.monotonic() if running else None
        return running

    def _step(self, batch: list[Job], running: _Running | None) -> _Running | None:
        """As :meth:`_advance`; checks an idle device when that is due."""
        self.busy_since = time.monotonic()
        self._held = (*batch, *(running.jobs if running else ()))
        if not batch and not running:
            self._kept_memory.free_if_idle(self._busy_until)
            if time.monotonic() - self._self_test.ended >= self._health_interval_seconds:
                self._self_test.run()
            return None
        if not self.passed_check:
            self._self_test.run()  # What it computes may be wrong.
        following = None
        if not self.passed_check:
            _refuse(batch, self._no_answer())
            batch = []
        if batch:
            try:
                following = self._begin(batch)
            except Exception as error:
                if running is None:
                    self._split(batch, error)
                else:  # Perhaps only the memory was missing that the running batch holds.
                    self._finish(running)
                    running, following = None, self._begin_or_split(batch)
        if running is not None:
            self._finish(running)
        if following is not None and self.device.type == "cpu":
            self._finish(following)
            following = None
        return following

    def _begin(self, jobs: Sequence[Job]) -> _Running:
        started, stream, callers = time.monotonic(), next(self._streams), _callers(jobs)
        for caller in callers:
            caller.started = started
        with on(stream):
            return _Running(list(jobs), callers, self._start(jobs, callers, stream), started, stream)

    def _begin_or_split(self, jobs: list[Job]) -> _Running | None:
        try:
            return self._begin(jobs)
        except Exception as error:
            self._split(jobs, error)
            return None

    def _start(self, jobs: Sequence[Job], callers: Sequence[Caller], stream: torch.cuda.Stream | None) -> Pending:
        first, stop = jobs[0], Stop()
        # Holds no job, as jobs hold it: a reference cycle would keep the tensors alive.
        departures = [caller.departure for caller in callers]

        def stop_if_all_left() -> None:
            for departure in departures:
                if not departure.happened:
                    return
            stop.ask()

        for job in jobs:
            job.when_left = stop_if_all_left
        for caller in callers:
            if caller.staging is not None:
                caller.staging.hand_over(stream)
        stop_if_all_left()  # Some may have left before when_left was set.
        requests, joined = [caller.request for caller in callers], [len(job.callers) for job in jobs]
        return submit(requests, first.loss, self.device, joined=joined, want_grad=first.want_grad, stop=stop)

    def _finish(self, running: _Running) -> None:
        """Waits for a batch and delivers its answers."""
        try:
            with on(running.stream):
                answers = running.pending.collect()
                computed = time.monotonic()
                mark = None if running.stream is None else _mark(running.stream)
                placed = _to_callers(answers, running.jobs)
                copy_seconds = time.monotonic() - computed
                if running.stream is not None and mark is not None:
                    copied = _mark(running.stream)
                    copied.synchronize()
                    copy_seconds = mark.elapsed_time(copied) / 1000
        except Exception as error:
            if running.stream is not None:
                # Copies that are queued write to memory that another request gets, once their callers are refused.
                with suppress(RuntimeError):  # The device has failed, and copies nothing more.
                    running.stream.synchronize()
            self._split(running.jobs, error)
            return
        now = time.monotonic()
        compute_seconds = max(0.0, now - running.started - copy_seconds)
        # On a GPU a batch may have started before the one before it ended.
        busy_seconds = now - max(running.started, self._busy_until)
        self._busy_until = now
        cost = elements = 0
        for job in running.jobs:
            cost += job.cost
            elements += job.elements
        for job in running.jobs:
            self._metrics.shares.add(job.tenant.label, busy_seconds * job.cost / cost if cost else 0.0)
        requests = len(running.callers)
        self._metrics.observe_batch(requests, elements, busy_seconds)
        remaining = iter(placed)
        for job in running.jobs:
            for caller in job.callers:
                answer, scale = next(remaining)
                if isinstance(answer, InvalidInput):
                    caller.refuse(answer)
                elif isinstance(answer, JointFault):
                    caller.refuse(JointBrokenError(f"rank {job.callers[answer.place].rank}: {answer.fault}"))
                else:
                    if math.isnan(answer.loss):
                        self._metrics.nonfinite_results.inc()
                    timing = running.started, compute_seconds, copy_seconds
                    caller.answer(Answer(answer, scale, *timing, requests, len(job.callers), caller is job.callers[0]))

    def _split(self, jobs: list[Job], error: Exception) -> None:
        """Computes a batch that failed in halves, so that only a job that cannot be computed is refused."""
        if isinstance(error, Stopped):
            _refuse(jobs, AbandonedError())
            return
        traceback.clear_frames(error.__traceback__)  # They hold what the failed attempt took of the device's memory.
        if isinstance(error, torch.OutOfMemoryError):
            self._kept_memory.free()
        if len(jobs) > 1:
            _log.warning("batch failed; computing it in halves", extra={"requests": len(jobs), "error": str(error)})
            middle = len(jobs) // 2
            for half in (jobs[:middle], jobs[middle:]):
                running = self._begin_or_split(half)
                if running is not None:
                    self._finish(running)
            return
        (job,) = jobs
        if is_out_of_memory(error):
            _log.warning("a request does not fit on the device", extra={"elements": job.elements})
            job.refuse(TooLargeError(f"{_what(job)} do not fit into the free memory of {self.device}"))
            return
        _log.error("a request could not be computed", exc_info=error)
        self._self_test.run()
        fault = error if self.passed_check else self._no_answer()
        job.refuse(fault)

    def _no_answer(self) -> DeviceError:
        return DeviceError(f"{self.device} does not answer; try another server")


def _callers(jobs: Sequence[Job]) -> list[Caller]:
    return [caller for job in jobs for caller in job.callers]


def _refuse(jobs: Sequence[Job], error: Exception) -> None:
    for job in jobs:
        job.refuse(error)


def _to_callers(answers: Sequence[CoreAnswer], jobs: Sequence[Job]) -> list[tuple[CoreAnswer, float]]:
    placed: list[tuple[CoreAnswer, float]] = []
    for job in jobs:
        placed += to_callers(answers[len(placed) : len(placed) + len(job.callers)], job.callers)
    return placed


def _what(job: Job) -> str:
    """Names the logits of a job, for people."""
    if len(job.callers) > 1:
        return f"the logits of {len(job.callers)} ranks, {job.elements} numbers,"
    return f"logits of shape {tuple(job.callers[0].request.logits.shape)}"


def on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    """Work inside goes to this stream; None on a CPU, which has none."""
    return _HERE if stream is None else torch.cuda.stream(stream)


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event that is reached once all work queued on the stream so far is done."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event
