"""A computation that nobody waits for any more ends early, and the next one does not notice."""

from __future__ import annotations

import threading
import time

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.ways import rank_on_cpu

from lovasz.core.backends.numba.workers import Workers
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

    def watch(self, tasks: npt.NDArray[np.int64]) -> None:
        super().watch(tasks)
        self.loops += 1
        if self.loops == self._loop:
            self.begin(tasks)

    def begin(self, tasks: npt.NDArray[np.int64]) -> None:
        self.ask()


class StopInTheMiddle(StopAt):
    """Is asked by another thread when tasks of the given loop have been claimed."""

    _thread: threading.Thread | None = None

    def begin(self, tasks: npt.NDArray[np.int64]) -> None:
        def ask() -> None:
            while tasks[0] < 2:
                time.sleep(0)
            self.ask()

        self._thread = threading.Thread(target=ask, daemon=True)
        self._thread.start()

    def check(self) -> None:
        if self._thread is not None:
            self._thread.join(60)
        super().check()


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
    def loop(tasks: npt.NDArray[np.int64]) -> None:
        raise ZeroDivisionError

    stop = Stop()
    with pytest.raises(ZeroDivisionError):
        Workers().run(loop, 1, stop=stop)
    stop.ask()
    with pytest.raises(Stopped):
        Workers().run(loop, 1, stop=stop)


def test_whoever_asks_while_a_loop_begins_ends_it_or_keeps_it_from_beginning() -> None:
    for _ in range(200):
        stop, tasks = Stop(), np.zeros(1, np.int64)
        thread, begins = threading.Thread(target=stop.ask), True
        thread.start()
        try:
            stop.watch(tasks)
        except Stopped:
            begins = False
        thread.join()
        assert not begins or tasks[0] > 1 << 60
        with pytest.raises(Stopped):
            stop.check()
