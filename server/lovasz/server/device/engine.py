"""The one thread that owns a device: takes batches, computes them, hands the answers out, and checks the device."""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from lovasz.core.answers import Answer as CoreAnswer
from lovasz.core.answers import JointFault, Pending
from lovasz.core.batch import Request
from lovasz.core.dispatch import advice, give_memory_back, submit, warm_up
from lovasz.core.stop import Stop, Stopped
from lovasz.server.errors import AbandonedError, DeviceError, JointBrokenError, TooLargeError
from lovasz.server.observe.metrics import Metrics
from lovasz.server.schedule.batcher import Answer, Batcher, Entry
from lovasz.spec import InvalidInput, LovaszHinge, LovaszSoftmax, Result, weighted_sum

_log = logging.getLogger(__name__)

_FLOAT16_PEAK_EXPONENT = 14
"""Float16 gradients are scaled so that the largest stands in [2^13, 2^14): a quarter of the range is left."""
_LARGEST_SCALE_EXPONENT = 126
_BLOCK_ELEMENTS = 1 << 15


@dataclass(frozen=True)
class _Running:
    entries: list[Entry]
    launched: Pending
    started: float
    stream: torch.cuda.Stream | None


class Engine:
    """Computes what its batcher holds, on one device, in one thread.

    On a GPU a batch is launched while the one before still runs, never more than one ahead. The two are on streams of
    their own, so that the answers of the first do not wait for the second.
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
        """Does not touch the device yet.

        Args:
            health_interval_seconds: how often an idle device is checked.
            stall_seconds: how long one batch may take before the device counts as unhealthy.
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
        self._busy_since: float | None = None
        self._busy_until = -math.inf
        self._answers = False
        self._last_check = -math.inf

    def start(self) -> None:
        """Compiles what the device will run, checks it, and starts the thread.

        Raises:
            DeviceError: the device does not answer right.
        """
        hint = advice(self.device)
        if hint is not None:
            _log.warning(hint)
        since = time.monotonic()
        try:
            warm_up(self.device)
        except Exception as error:
            raise DeviceError(f"{self.device} cannot compute: {error}") from error
        _log.info("compiled", extra={"device": str(self.device), "seconds": round(time.monotonic() - since, 1)})
        self._check()
        if not self._answers:
            raise DeviceError(f"{self.device} did not compute a known loss; the log says why")
        self._thread.start()

    def stop(self, timeout_seconds: float) -> bool:
        """Computes what is queued, then ends the thread; True if it did so in time."""
        self._batcher.close()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    @property
    def healthy(self) -> bool:
        """Whether the device gave the right answer when it was last checked, and has not been stuck since."""
        since = self._busy_since
        return self._answers and (since is None or time.monotonic() - since < self._stall_seconds)

    def _run(self) -> None:
        running: _Running | None = None
        while running is not None or not self._batcher.finished:
            batch = self._batcher.take(idle=running is None, timeout_seconds=self._health_interval_seconds)
            try:
                running = self._step(batch, running)
            except Exception as error:
                _log.exception("a fault of the engine itself")
                for entry in _members([*batch, *(running.entries if running else ())]):
                    if not entry.future.done():
                        entry.future.set_exception(error)
                running = None
            batch.clear()  # So that nothing is held while the next is waited for.
            self._busy_since = time.monotonic() if running else None

    def _step(self, batch: list[Entry], running: _Running | None) -> _Running | None:
        """Launches a batch, finishes the one before, and returns what runs then."""
        if not batch and not running:
            if time.monotonic() - self._last_check >= self._health_interval_seconds:
                self._check()
            return None
        self._busy_since = time.monotonic()
        launched = None
        if batch:
            try:
                launched = self._begin(batch)
            except Exception as error:
                if running is None:
                    self._split(batch, error)
                else:  # The memory that it holds may be all that was missing.
                    self._finish(running)
                    running, launched = None, self._launch(batch)
        if running is not None:
            self._finish(running)
        if launched is not None and self.device.type == "cpu":
            self._finish(launched)
            launched = None
        return launched

    def _begin(self, entries: Sequence[Entry]) -> _Running:
        started, stream = time.monotonic(), next(self._streams)
        for entry in _members(entries):
            entry.started = started
        with on(stream):
            return _Running(list(entries), self._start(entries, stream), started, stream)

    def _launch(self, entries: list[Entry]) -> _Running | None:
        try:
            return self._begin(entries)
        except Exception as error:
            self._split(entries, error)
            return None

    def _start(self, entries: Sequence[Entry], stream: torch.cuda.Stream | None) -> Pending:
        first, stop, members = entries[0], Stop(), _members(entries)

        def stop_if_all_left() -> None:
            if all(entry.left for entry in members):
                stop.ask()

        for entry in members:
            entry.when_left = stop_if_all_left
            if entry.staging is not None and entry.staging.upload is not None:
                entry.staging.upload.hand_over(stream)
        stop_if_all_left()  # Those that left before they were told whom to tell.
        requests, joined = [entry.request for entry in members], [len(entry.members) for entry in entries]
        return submit(requests, first.loss, self.device, joined=joined, want_grad=first.want_grad, stop=stop)

    def _finish(self, running: _Running) -> None:
        try:
            with on(running.stream):
                answers = iter(running.launched.collect())
                computed = time.monotonic()
                mark = None if running.stream is None else _mark(running.stream)
                hosted = [
                    answer
                    for entry in running.entries
                    for answer in _to_host([next(answers) for _ in entry.members], entry.members)
                ]
                copy_seconds = time.monotonic() - computed
                if running.stream is not None and mark is not None:
                    copied = _mark(running.stream)
                    copied.synchronize()
                    copy_seconds = mark.elapsed_time(copied) / 1000
        except Exception as error:
            self._split(running.entries, error)
            return
        now = time.monotonic()
        compute_seconds = max(0.0, now - running.started - copy_seconds)
        # On a GPU a batch may have begun before the one before it ended.
        self._metrics.device_busy_seconds.inc(now - max(running.started, self._busy_until))
        self._busy_until = now
        members = _members(running.entries)
        self._metrics.observe_batch(len(members), sum(entry.request.layout.elements for entry in members))
        for entry, (answer, scale) in zip(members, hosted, strict=True):
            if isinstance(answer, InvalidInput):
                entry.future.set_exception(answer)
            elif isinstance(answer, JointFault):
                entry.future.set_exception(JointBrokenError(f"rank {answer.place}: {answer.fault}"))
            else:
                if math.isnan(answer.loss):
                    self._metrics.nonfinite_results.inc()
                timing = running.started, compute_seconds, copy_seconds
                entry.future.set_result(Answer(answer, scale, *timing, len(members)))

    def _split(self, entries: list[Entry], error: Exception) -> None:
        """A batch failed: computes it in halves, so that a request which cannot be computed is refused alone."""
        if isinstance(error, Stopped):
            _refuse(entries, AbandonedError("the caller went away"))
            return
        traceback.clear_frames(error.__traceback__)  # They hold what the failed attempt took of the device's memory.
        if self.device.type == "cuda" and isinstance(error, torch.OutOfMemoryError):
            give_memory_back()
            torch.cuda.empty_cache()
        if len(entries) > 1:
            _log.warning("batch failed; computing it in halves", extra={"requests": len(entries), "error": str(error)})
            middle = len(entries) // 2
            for half in (entries[:middle], entries[middle:]):
                running = self._launch(half)
                if running is not None:
                    self._finish(running)
            return
        (entry,) = entries
        if is_out_of_memory(error):
            _log.warning("a request does not fit on the device", extra={"elements": entry.elements})
            what = f"logits of shape {tuple(entry.request.logits.shape)}"
            if entry.joined:
                what = f"the logits of {len(entry.joined)} ranks, {entry.elements} numbers,"
            _refuse(entries, TooLargeError(f"{what} do not fit into the free memory of {self.device}"))
            return
        _log.error("a request could not be computed", exc_info=error)
        self._check()
        fault = error if self._answers else DeviceError(f"{self.device} does not answer; try another server")
        _refuse(entries, fault)

    def _check(self) -> None:
        """Asks the device for losses that are known."""
        was_answering = self._answers
        try:
            self._answers = _known_losses_hold(self.device)
            if not self._answers:
                _log.error("the device computes wrongly", extra={"device": str(self.device)})
        except Exception:
            self._answers = False
            _log.exception("the device does not answer", extra={"device": str(self.device)})
        if self._answers and not was_answering:
            _log.info("the device answers", extra={"device": str(self.device)})
        self._last_check = time.monotonic()


def _members(entries: Sequence[Entry]) -> list[Entry]:
    """Entries with those that they are joined with."""
    return [member for entry in entries for member in entry.members]


def _refuse(entries: Sequence[Entry], error: Exception) -> None:
    for entry in _members(entries):
        entry.future.set_exception(error)


def on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    """Work inside goes to this stream; None on a CPU, which has none."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event to which the stream comes after what is queued on it."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device, or the host, had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def _to_host(answers: Sequence[CoreAnswer], entries: Sequence[Entry]) -> list[tuple[CoreAnswer, float]]:
    """The answers to entries that are joined, their gradients at their places on the host, once the current stream has
    come to it; and what these are multiplied with, the same for all."""
    grads = [answer.grad for answer in answers if isinstance(answer, Result) and answer.grad is not None]
    if len(grads) < len(answers):
        return [(answer, 1.0) for answer in answers]
    dtype = entries[0].request.logits.dtype
    scale = wire_scale(grads, dtype)
    hosted: list[tuple[CoreAnswer, float]] = []
    for answer, grad, entry in zip(answers, grads, entries, strict=True):
        assert isinstance(answer, Result)
        place = None if entry.staging is None else entry.staging.grad
        if place is None:
            place = torch.empty(grad.shape, dtype=dtype)
        write_scaled(grad, scale, place)
        hosted.append((Result(answer.loss, place, answer.terms, answer.intersection, answer.union), scale))
    return hosted


def wire_scale(grads: Sequence[torch.Tensor], dtype: torch.dtype) -> float:
    """The power of two that gradients are multiplied with, so that float16 does not underflow; 1 for other types."""
    if dtype != torch.float16:
        return 1.0
    extremes = [_extremes(grad) for grad in grads]
    peak = max(max(-smallest, largest) for smallest, largest in extremes)
    if not 0 < peak < math.inf:
        return 1.0
    # Any scale in reach of a float32, so that the product is exact.
    return math.ldexp(1.0, min(_FLOAT16_PEAK_EXPONENT - math.frexp(peak)[1], _LARGEST_SCALE_EXPONENT))


def write_scaled(grad: torch.Tensor, scale: float, place: torch.Tensor) -> None:
    """Writes a gradient, which is used up by that, times the scale to its place, in the element type that this has."""
    if grad.device.type != "cpu":
        place.copy_(grad.mul_(scale) if scale != 1 else grad, non_blocking=True)
    elif grad.data_ptr() != place.data_ptr():
        # In blocks that stay in cache, and are so small that torch does them in this thread alone: its other threads
        # would go on spinning for a while, on a processor that the computation is in want of.
        for source, target in zip(
            grad.view(-1).split(_BLOCK_ELEMENTS), place.view(-1).split(_BLOCK_ELEMENTS), strict=True
        ):
            target.copy_(source.mul_(scale) if scale != 1 else source)


def _extremes(values: torch.Tensor) -> tuple[float, float]:
    if values.device.type == "cpu":
        array = values.numpy()
        return float(array.min()), float(array.max())
    smallest, largest = torch.aminmax(values)
    return float(smallest), float(largest)


def _known_losses_hold(device: torch.device) -> bool:
    logits = torch.tensor([[[2.0, -1.0]], [[0.5, 1.5]]])
    hinge, softmax = weighted_sum(LovaszHinge()), weighted_sum(LovaszSoftmax(classes="all"))
    known = (
        (hinge, logits, torch.tensor([[[0, 0]], [[1, 1]]]), 7 / 6),
        # Equal logits: every error is 1/2. Class 0 has the one pixel of two: J = 1/2 (1 + 0); class 1 the same.
        (softmax, torch.zeros(1, 2, 2), torch.tensor([[0, 1]]), 0.5),
    )
    for loss, scores, labels, expected in known:
        (answer,) = submit([Request.checked(scores, labels, loss)], loss, device).collect()
        if not isinstance(answer, Result) or not math.isclose(answer.loss, expected, rel_tol=1e-6):
            return False
    return True
