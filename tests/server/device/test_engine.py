"""The engine: answers, failures of a batch, and what it says of its device."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lovasz.core import compute
from lovasz.core.answers import Pending
from lovasz.core.batch import Request
from lovasz.core.dispatch import submit
from lovasz.server.device.engine import Engine, wire_scale, write_scaled
from lovasz.server.errors import AbandonedError, DeviceError, TooLargeError
from lovasz.server.observe.metrics import Metrics
from lovasz.server.schedule.batcher import Batcher, Entry
from lovasz.spec import InvalidInput, LovaszSoftmax, weighted_sum

SOFTMAX = weighted_sum(LovaszSoftmax())
CPU = torch.device("cpu")


def entry(pixels: int, *, label: int = 1, dtype: torch.dtype = torch.float32) -> Entry:
    generator = torch.Generator().manual_seed(pixels)
    logits = torch.randn(1, 3, pixels, generator=generator).to(dtype)
    labels = torch.randint(0, 3, (1, pixels), generator=generator)
    labels[0, 0] = label
    return Entry(Request.checked(logits, labels, SOFTMAX), SOFTMAX, want_grad=True, deadline=None)


class WeakEngine(Engine):
    """An engine on a device that runs out of memory beyond so many logits, and breaks at one size."""

    memory_elements = 10**9
    poison_pixels = -1

    def _start(self, entries: Sequence[Entry], stream: torch.cuda.Stream | None) -> Pending:
        if sum(one.request.layout.elements for one in entries) > self.memory_elements:
            raise torch.OutOfMemoryError("no memory left")
        if any(one.request.layout.pixels == self.poison_pixels for one in entries):
            raise RuntimeError("a kernel failed")
        return super()._start(entries, stream)


@pytest.fixture
def engine() -> Iterator[WeakEngine]:
    """Not started: what is put into its queue before ``start`` is one batch."""
    engine = WeakEngine(CPU, Batcher(10**9, 100, 0.0), Metrics(), health_interval_seconds=0.05, stall_seconds=60.0)
    yield engine
    assert engine.stop(timeout_seconds=10)


def run(engine: WeakEngine, *entries: Entry) -> None:
    for one in entries:
        engine._batcher.put(one)
    engine.start()


def test_each_gets_its_own_answer_from_a_shared_batch(engine: WeakEngine) -> None:
    entries = [entry(pixels) for pixels in (5, 50, 500)]
    run(engine, *entries)
    for one in entries:
        answer = one.future.result(timeout=30)
        local = compute(one.request.logits, one.request.labels, SOFTMAX)
        assert answer.batch_requests == 3
        assert answer.result.loss == local.loss
        assert torch.equal(answer.result.grad, local.grad)


def test_a_bad_request_is_refused_alone(engine: WeakEngine) -> None:
    good, bad = entry(20), entry(30, label=7)
    run(engine, good, bad)
    assert good.future.result(timeout=30).batch_requests == 2
    with pytest.raises(InvalidInput, match=r"labels: got 7 at index \[0, 0\]"):
        bad.future.result(timeout=30)


def test_out_of_memory_splits_the_batch(engine: WeakEngine) -> None:
    engine.memory_elements = 3 * 100
    small = [entry(pixels) for pixels in (60, 61, 62, 63)]
    huge = entry(101)
    run(engine, *small, huge)
    assert [one.future.result(timeout=30).batch_requests for one in small] == [1] * 4
    with pytest.raises(TooLargeError, match=r"shape \(1, 3, 101\) do not fit"):
        huge.future.result(timeout=30)
    assert engine.healthy


def test_a_request_that_breaks_the_kernel_fails_alone(engine: WeakEngine) -> None:
    engine.poison_pixels = 13
    entries = [entry(pixels) for pixels in (11, 12, 13, 14)]
    run(engine, *entries)
    for one in entries:
        if one.request.layout.pixels == 13:
            with pytest.raises(RuntimeError, match="a kernel failed"):
                one.future.result(timeout=30)
        else:
            assert one.future.result(timeout=30).result.loss > 0
    assert engine.healthy


# --- Callers that leave -------------------------------------------------------------------------------------------


class LeavingEngine(WeakEngine):
    """An engine whose callers leave when their batch is started, before or after anybody wants to be told."""

    leaving: tuple[Entry, ...] = ()
    early = False

    def _start(self, entries: Sequence[Entry], stream: torch.cuda.Stream | None) -> Pending:
        if self.early:
            self.leave()
        return super()._start(entries, stream)

    def leave(self) -> None:
        for one in self.leaving:
            one.cancel()


@pytest.fixture(params=[True, False], ids=["early", "late"])
def leaving(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[LeavingEngine]:
    """Not started."""
    pytest.importorskip("numba", reason="only compiled loops can be stopped")
    engine = LeavingEngine(CPU, Batcher(10**9, 100, 0.0), Metrics(), health_interval_seconds=0.05, stall_seconds=60.0)
    engine.early = request.param

    def launch_and_leave(*arguments: Any, stop: Any = None, **options: Any) -> Pending:
        if stop is not None and not engine.early:
            engine.leave()
        return submit(*arguments, stop=stop, **options)

    monkeypatch.setattr("lovasz.server.device.engine.submit", launch_and_leave)
    yield engine
    assert engine.stop(timeout_seconds=10)


def test_a_batch_whose_callers_have_all_left_is_given_up(leaving: LeavingEngine) -> None:
    entries = leaving.leaving = (entry(20), entry(30))
    run(leaving, *entries)
    for one in entries:
        with pytest.raises(AbandonedError, match="the caller went away"):
            one.future.result(timeout=30)
    leaving.leaving = ()
    after = entry(40)
    leaving._batcher.put(after)
    local = compute(after.request.logits, after.request.labels, SOFTMAX)
    answer = after.future.result(timeout=30)
    assert answer.result.loss == local.loss
    assert torch.equal(answer.result.grad, local.grad)
    assert leaving.healthy


def test_who_stays_gets_its_answer(leaving: LeavingEngine) -> None:
    gone, here = entry(20), entry(30)
    leaving.leaving = (gone,)
    run(leaving, gone, here)
    local = compute(here.request.logits, here.request.labels, SOFTMAX)
    answer = here.future.result(timeout=30)
    assert answer.batch_requests == 2
    assert answer.result.loss == local.loss
    assert torch.equal(answer.result.grad, local.grad)


def test_who_leaves_when_all_is_done_changes_nothing(engine: WeakEngine) -> None:
    one = entry(20)
    run(engine, one)
    assert one.future.result(timeout=30).result.loss > 0
    one.cancel()
    other = entry(30)
    engine._batcher.put(other)
    assert other.future.result(timeout=30).result.loss > 0


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
        one = entry(10)
        engine._batcher.put(one)
        with pytest.raises(DeviceError, match="cpu does not answer"):
            one.future.result(timeout=30)
        assert not engine.healthy
    other = entry(10)
    engine._batcher.put(other)
    assert other.future.result(timeout=30).result.loss > 0
    for _ in range(200):
        if engine.healthy:
            break
        engine._thread.join(0.05)
    assert engine.healthy


@pytest.mark.parametrize("largest", [1.0, 3e-7, 1e-30, 2.0**20])
def test_float16_gradients_neither_underflow_nor_overflow(largest: float) -> None:
    grad = torch.tensor([1.0, -0.5, 1e-3, 0.0]) * largest
    half = torch.empty_like(grad, dtype=torch.float16)
    scale = wire_scale([grad], half.dtype)
    write_scaled(grad.clone(), scale, half)
    assert np.log2(scale) == int(np.log2(scale))
    assert torch.isfinite(half).all()
    assert torch.allclose(half.double() / scale, grad.double(), rtol=2**-11, atol=0)


def test_gradients_that_are_zero_or_not_finite_keep_the_scale_of_one() -> None:
    for value in (0.0, float("nan"), float("inf")):
        half = torch.zeros(3, dtype=torch.float16)
        grad = torch.full((3,), value)
        assert wire_scale([grad], half.dtype) == 1.0
        write_scaled(grad, 1.0, half)
        assert np.array_equal(half.float().numpy(), np.full(3, value, np.float32), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_time_of_a_batch_is_that_of_computing_and_of_copying(engine: WeakEngine, dtype: torch.dtype) -> None:
    one = entry(1 << 16, dtype=dtype)
    before = time.monotonic()
    run(engine, one)
    answer = one.future.result(timeout=30)
    assert answer.started >= before
    assert answer.compute_seconds > 0
    assert answer.copy_seconds >= 0
    assert answer.started + answer.compute_seconds + answer.copy_seconds <= time.monotonic()


def test_says_when_a_faster_way_can_be_had_and_compiles_before_it_serves(
    engine: WeakEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled: list[torch.device] = []
    monkeypatch.setattr("lovasz.server.device.engine.advice", lambda device: f"faster on {device} with numba")
    monkeypatch.setattr("lovasz.server.device.engine.warm_up", compiled.append)
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
