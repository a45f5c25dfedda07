"""A computation that nobody waits for any more ends early, and the next one does not notice."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.ways import rank_on_cpu

from lovasz.core.batch import Request
from lovasz.core.dispatch import Backend, submit
from lovasz.core.stop import Stop, Stopped
from lovasz.spec import (
    BinaryCrossEntropy,
    CrossEntropy,
    LossLike,
    LovaszHinge,
    LovaszSigmoid,
    LovaszSoftmax,
    weighted_sum,
)

pytest.importorskip("numba", reason="only compiled loops can be stopped")

CPU = torch.device("cpu")
LOSSES: dict[str, LossLike] = {
    "softmax": LovaszSoftmax(classes="all"),
    "hinge": LovaszHinge(),
    "binary sum": [(1.0, BinaryCrossEntropy()), (1.0, LovaszSigmoid())],
    "sum": [(0.5, CrossEntropy()), (1.0, LovaszSoftmax(per_image=True)), (1.0, LovaszSoftmax())],
    "probabilities": LovaszSoftmax(input="probabilities"),
}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())

Answer = tuple[float, bytes]


def request(loss: LossLike, pixels: int = 40_000) -> Request:
    total = weighted_sum(loss)
    generator = torch.Generator().manual_seed(1)
    if total.is_binary:
        labels = torch.randint(0, 2, (2, pixels), generator=generator)
        return Request.checked(torch.randn(2, pixels, generator=generator), labels, total)
    logits = torch.randn(2, 3, pixels, generator=generator)
    labels = torch.randint(0, 3, (2, pixels), generator=generator)
    return Request.checked(logits.softmax(1) if total.probabilities else logits, labels, total)


@pytest.fixture(params=["in tables", "by sorting"])
def ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    rank_on_cpu(request.param, monkeypatch)


def answer(one: Request, loss: LossLike, stop: Stop | None = None) -> Answer:
    (result,) = submit([one], weighted_sum(loss), CPU, backend=Backend.NUMBA, stop=stop).collect()
    assert not isinstance(result, Exception)
    assert result.grad is not None
    return result.loss, result.grad.numpy().tobytes()


class StopAt(Stop):
    """Is asked when the given loop begins (0: never), and counts the loops."""

    def __init__(self, loop: int) -> None:
        super().__init__()
        self._loop = loop
        self.loops = 0

    @contextmanager
    def watching(self, tasks: npt.NDArray[np.int64]) -> Iterator[None]:
        with super().watching(tasks):
            self.loops += 1
            if self.loops == self._loop:
                self.ask()
            yield


class StopInTheMiddle(StopAt):
    """Is asked by another thread when tasks of the given loop have been claimed."""

    @contextmanager
    def watching(self, tasks: npt.NDArray[np.int64]) -> Iterator[None]:
        def ask() -> None:
            while tasks[0] < 2:
                time.sleep(0)
            self.ask()

        with Stop.watching(self, tasks):
            self.loops += 1
            if self.loops != self._loop:
                yield
                return
            thread = threading.Thread(target=ask)
            thread.start()
            try:
                yield
            finally:
                tasks[0] += 2  # So that the thread ends, whatever became of the loop.
                thread.join()


@pytest.mark.usefixtures("ranks")
@each_loss
def test_who_does_not_ask_gets_the_same_bits(loss: LossLike, threads: None) -> None:
    torch.set_num_threads(2)
    one, stop = request(loss), Stop()
    expected = answer(one, loss)
    assert answer(one, loss, stop) == expected
    assert answer(one, loss, stop) == expected


@pytest.mark.usefixtures("ranks")
@each_loss
def test_asked_before_it_does_not_begin(loss: LossLike) -> None:
    one, stop = request(loss), StopAt(0)
    expected = answer(one, loss)
    stop.ask()
    for _ in range(2):
        with pytest.raises(Stopped):
            answer(one, loss, stop)
    assert stop.loops == 0
    assert answer(one, loss) == expected


@pytest.mark.usefixtures("ranks")
@each_loss
def test_asked_in_any_of_its_loops_it_ends_and_leaves_nothing_behind(loss: LossLike, threads: None) -> None:
    torch.set_num_threads(2)
    one, counting = request(loss), StopAt(0)
    expected = answer(one, loss, counting)
    assert counting.loops >= 2
    for loop in range(1, counting.loops + 1):
        stop = StopAt(loop)
        with pytest.raises(Stopped):
            answer(one, loss, stop)
        assert stop.loops == loop
        assert answer(one, loss) == expected


@pytest.mark.parametrize("threads_of_torch", [1, 2])
def test_asked_from_another_thread_in_the_middle(threads_of_torch: int, threads: None) -> None:
    torch.set_num_threads(threads_of_torch)
    loss = LovaszSoftmax(classes="all")
    labels = torch.zeros(1, 2048, 2048, dtype=torch.uint8)
    labels[0, ::3] = 5
    large = Request.checked(torch.zeros(1, 8, 2048, 2048), labels, weighted_sum(loss))
    small = request(loss)
    expected, expected_small = answer(large, loss), answer(small, loss)
    for loop in (1, 2):
        stop = StopInTheMiddle(loop)
        with pytest.raises(Stopped):
            answer(large, loss, stop=stop)
        assert stop.loops == loop
        assert answer(small, loss) == expected_small
    assert answer(large, loss) == expected


def test_one_batch_ends_and_another_beside_it_goes_on() -> None:
    loss = LovaszSoftmax(classes="all")
    one = request(loss)
    expected = answer(one, loss)
    stopped, going_on = Stop(), Stop()
    stopped.ask()
    with pytest.raises(Stopped):
        answer(one, loss, stop=stopped)
    assert answer(one, loss, stop=going_on) == expected


def test_an_error_in_a_loop_is_not_taken_for_a_stop() -> None:
    stop, tasks = Stop(), np.zeros(1, np.int64)
    with pytest.raises(ZeroDivisionError), stop.watching(tasks):
        raise ZeroDivisionError
    stop.ask()
    assert tasks[0] == 0  # It is not watched any more.
