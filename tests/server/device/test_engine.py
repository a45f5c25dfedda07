"""The engine: answers, failures of a batch, and what it says of its device."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from support.streams import Stream, stand_in
from support.waiting import eventually

from lovasz.core import compute
from lovasz.core.answers import Pending
from lovasz.core.batch import Request
from lovasz.core.dispatch import Backend, submit
from lovasz.server.device.engine import Engine
from lovasz.server.errors import AbandonedError, DeviceError, TooLargeError
from lovasz.server.observe.metrics import Metrics
from lovasz.server.schedule.batcher import Batcher
from lovasz.server.schedule.job import Answer, Caller, Job, cost_of
from lovasz.spec import InvalidInput, LovaszSoftmax, weighted_sum

SOFTMAX = weighted_sum(LovaszSoftmax())
CPU = torch.device("cpu")


def job(pixels: int, *, label: int = 1, dtype: torch.dtype = torch.float32) -> Job:
    generator = torch.Generator().manual_seed(pixels)
    logits = torch.randn(1, 3, pixels, generator=generator).to(dtype)
    labels = torch.randint(0, 3, (1, pixels), generator=generator)
    labels[0, 0] = label
    request = Request.checked(logits, labels, SOFTMAX)
    return Job(
        (Caller(request, cost_of(request.layout.elements, SOFTMAX.segments(request.layout))),), SOFTMAX, want_grad=True
    )


def request_of(job: Job) -> Request:
    return job.callers[0].request


def answer_to(job: Job) -> Answer:
    return job.callers[0].wait(timeout_seconds=30)


class WeakEngine(Engine):
    """An engine on a device that runs out of memory beyond so many logits, and breaks at one size."""

    memory_elements = 10**9
    poison_pixels = -1

    def _start(self, jobs: Sequence[Job], callers: Sequence[Caller], stream: torch.cuda.Stream | None) -> Pending:
        if sum(job.elements for job in jobs) > self.memory_elements:
            raise torch.OutOfMemoryError("no memory left")
        if any(request_of(job).layout.pixels == self.poison_pixels for job in jobs):
            raise RuntimeError("a kernel failed")
        return super()._start(jobs, callers, stream)


@pytest.fixture
def engine() -> Iterator[WeakEngine]:
    """Not started: what is put into its queue before ``start`` is one batch."""
    engine = WeakEngine(CPU, Batcher(10**9, 100, 0.0), Metrics(), health_interval_seconds=0.05, stall_seconds=60.0)
    yield engine
    assert engine.stop(timeout_seconds=10)


def run(engine: WeakEngine, *jobs: Job) -> None:
    for one in jobs:
        engine._batcher.put(one)
    engine.start()


def test_each_gets_its_own_answer_from_a_shared_batch(engine: WeakEngine) -> None:
    jobs = [job(pixels) for pixels in (5, 50, 500)]
    run(engine, *jobs)
    for one in jobs:
        answer = answer_to(one)
        local = compute(request_of(one).logits, request_of(one).labels, SOFTMAX)
        assert answer.batch_requests == 3
        assert answer.result.loss == local.loss
        assert torch.equal(answer.result.grad, local.grad)


def test_a_bad_request_is_refused_alone(engine: WeakEngine) -> None:
    good, bad = job(20), job(30, label=7)
    run(engine, good, bad)
    assert answer_to(good).batch_requests == 2
    with pytest.raises(InvalidInput, match=r"labels: got 7 at index \[0, 0\]"):
        answer_to(bad)


def test_out_of_memory_splits_the_batch(engine: WeakEngine) -> None:
    engine.memory_elements = 3 * 100
    small = [job(pixels) for pixels in (60, 61, 62, 63)]
    huge = job(101)
    run(engine, *small, huge)
    assert [answer_to(one).batch_requests for one in small] == [1] * 4
    with pytest.raises(TooLargeError, match=r"shape \(1, 3, 101\) do not fit"):
        answer_to(huge)
    assert engine.healthy


def test_a_request_that_breaks_the_kernel_fails_alone(engine: WeakEngine) -> None:
    engine.poison_pixels = 13
    jobs = [job(pixels) for pixels in (11, 12, 13, 14)]
    run(engine, *jobs)
    for one in jobs:
        if request_of(one).layout.pixels == 13:
            with pytest.raises(RuntimeError, match="a kernel failed"):
                answer_to(one)
        else:
            assert answer_to(one).result.loss > 0
    assert engine.healthy


def test_a_batch_that_fails_is_refused_when_no_copy_is_on_its_way(
    engine: WeakEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    stream, seen = Stream("engine"), list[str]()
    stream.when_waited = lambda: seen.append("waited")
    engine._streams = itertools.repeat(stream)
    refuse = Job.refuse

    def refuse_and_note(self: Job, error: Exception) -> None:
        seen.append("refused")
        refuse(self, error)

    def fail(*_: Any) -> None:
        raise RuntimeError("no pinned memory left")

    monkeypatch.setattr(Job, "refuse", refuse_and_note)
    monkeypatch.setattr("lovasz.server.device.engine._mark", lambda stream: stream)
    monkeypatch.setattr("lovasz.server.device.engine.to_callers", fail)
    one = job(20)
    run(engine, one)
    with pytest.raises(RuntimeError, match="no pinned memory left"):
        answer_to(one)
    assert seen[:2] == ["waited", "refused"]


# --- Callers that leave -------------------------------------------------------------------------------------------


class LeavingEngine(WeakEngine):
    """An engine whose callers leave when their batch is started, before or after anybody wants to be told."""

    leaving: tuple[Job, ...] = ()
    early = False

    def _start(self, jobs: Sequence[Job], callers: Sequence[Caller], stream: torch.cuda.Stream | None) -> Pending:
        if self.early:
            self.leave()
        return super()._start(jobs, callers, stream)

    def leave(self) -> None:
        for one in self.leaving:
            one.leave(one.callers[0])


@pytest.fixture(params=[True, False], ids=["early", "late"])
def leaving(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[LeavingEngine]:
    """Not started."""
    pytest.importorskip("numba", reason="only compiled loops can be stopped")
    engine = LeavingEngine(CPU, Batcher(10**9, 100, 0.0), Metrics(), health_interval_seconds=0.05, stall_seconds=60.0)
    engine.early = request.param

    def submit_and_leave(*arguments: Any, stop: Any = None, **options: Any) -> Pending:
        if stop is not None and not engine.early:
            engine.leave()
        return submit(*arguments, stop=stop, **options)

    monkeypatch.setattr("lovasz.server.device.engine.submit", submit_and_leave)
    yield engine
    assert engine.stop(timeout_seconds=10)


def test_a_batch_whose_callers_have_all_left_is_given_up(leaving: LeavingEngine) -> None:
    jobs = leaving.leaving = (job(20), job(30))
    run(leaving, *jobs)
    for one in jobs:
        with pytest.raises(AbandonedError, match="the caller went away"):
            answer_to(one)
    leaving.leaving = ()
    after = job(40)
    leaving._batcher.put(after)
    local = compute(request_of(after).logits, request_of(after).labels, SOFTMAX)
    answer = answer_to(after)
    assert answer.result.loss == local.loss
    assert torch.equal(answer.result.grad, local.grad)
    assert leaving.healthy


def test_who_stays_gets_its_answer(leaving: LeavingEngine) -> None:
    gone, here = job(20), job(30)
    leaving.leaving = (gone,)
    run(leaving, gone, here)
    local = compute(request_of(here).logits, request_of(here).labels, SOFTMAX)
    answer = answer_to(here)
    assert answer.batch_requests == 2
    assert answer.result.loss == local.loss
    assert torch.equal(answer.result.grad, local.grad)


def test_who_leaves_when_all_is_done_changes_nothing(engine: WeakEngine) -> None:
    one = job(20)
    run(engine, one)
    assert answer_to(one).result.loss > 0
    one.leave(one.callers[0])
    other = job(30)
    engine._batcher.put(other)
    assert answer_to(other).result.loss > 0


def test_a_device_that_does_not_compute_is_unhealthy_and_recovers(
    engine: WeakEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.start()
    assert engine.healthy
    broken = RuntimeError("device lost")

    def lost(*_: object, **__: object) -> Pending:
        raise broken

    with monkeypatch.context() as patch:
        patch.setattr("lovasz.server.device.engine.submit", lost)
        patch.setattr("lovasz.server.device.self_test.submit", lost)
        one = job(10)
        engine._batcher.put(one)
        with pytest.raises(DeviceError, match="cpu does not answer"):
            answer_to(one)
        assert not engine.healthy
    other = job(10)
    engine._batcher.put(other)
    assert answer_to(other).result.loss > 0
    for _ in range(200):
        if engine.healthy:
            break
        engine._thread.join(0.05)
    assert engine.healthy


def test_an_idle_cpu_computes_a_small_job_in_the_thread_that_brings_it(engine: WeakEngine) -> None:
    one = job(10)
    assert not engine.compute_now(one)  # It has not started.
    engine.start()
    assert eventually(lambda: engine.compute_now(one))  # Not while it checks the device.
    assert one.callers[0].answered
    assert answer_to(one).result.loss == compute(request_of(one).logits, request_of(one).labels, SOFTMAX).loss
    assert not engine.compute_now(job(1 << 18))
    left = job(10)
    left.leave(left.callers[0])
    assert eventually(lambda: engine.compute_now(left))
    assert left.callers[0].started is None


def test_without_numba_the_engine_computes_in_its_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lovasz.server.device.engine.installed", lambda package: False)
    engine = Engine(CPU, Batcher(10**9, 100, 0.0), Metrics(), health_interval_seconds=60.0, stall_seconds=60.0)
    engine.start()
    assert not engine.compute_now(job(10))
    assert engine.stop(timeout_seconds=10)


def test_a_job_is_queued_while_others_wait_or_are_computed(engine: WeakEngine) -> None:
    engine.start()
    with engine._using:
        assert not engine.compute_now(job(10))
        first = job(10)
        engine._batcher.put(first)
    assert answer_to(first).result.loss > 0
    with engine._batcher._changed:
        engine._batcher._waiting[first.key] = [first]
        assert not engine.compute_now(job(10))
        del engine._batcher._waiting[first.key]


def test_what_fails_in_the_thread_that_brings_it_is_refused(engine: WeakEngine) -> None:
    engine.poison_pixels = 10
    engine.start()
    one = job(10)
    assert eventually(lambda: engine.compute_now(one))
    with pytest.raises(RuntimeError, match="a kernel failed"):
        answer_to(one)
    other = job(11)
    assert eventually(lambda: engine.compute_now(other))
    assert answer_to(other).result.loss > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_time_of_a_batch_is_that_of_computing_and_of_copying(engine: WeakEngine, dtype: torch.dtype) -> None:
    one = job(1 << 16, dtype=dtype)
    before = time.monotonic()
    run(engine, one)
    answer = answer_to(one)
    assert answer.started >= before
    assert answer.compute_seconds > 0
    assert answer.copy_seconds >= 0
    assert answer.started + answer.compute_seconds + answer.copy_seconds <= time.monotonic()


def test_says_when_a_faster_way_can_be_had_and_compiles_before_it_serves(
    engine: WeakEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled: list[torch.device] = []
    monkeypatch.setattr("lovasz.server.device.engine.advice", lambda device: f"faster on {device} with numba")

    def warm_up(device: torch.device) -> Backend:
        compiled.append(device)
        return Backend.NUMBA

    monkeypatch.setattr("lovasz.server.device.engine.warm_up", warm_up)
    with caplog.at_level("INFO"):
        engine.start()
    assert compiled == [CPU]
    assert "faster on cpu with numba" in caplog.messages
    assert "compiled" in caplog.messages


def test_a_device_that_cannot_compile_is_refused_at_the_start(
    engine: WeakEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr("lovasz.server.device.engine.warm_up", fail)
    with pytest.raises(DeviceError, match="cpu cannot compute: no such instruction"):
        engine.start()
