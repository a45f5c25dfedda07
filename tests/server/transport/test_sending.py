"""The watch over answers: it passes them on, and cuts off those whose callers do not take them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import pytest

from lovasz.server.observe.metrics import Metrics
from lovasz.server.transport import sending
from lovasz.server.transport.sending import SendWatch

MESSAGES = [memoryview(b"one"), memoryview(b"two"), memoryview(b"three")]


class Clock:
    """Stands in for the module ``time``; goes when it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(sending, "time", clock)
    return clock


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def stalled(metrics: Metrics) -> float | None:
    return metrics.registry.get_sample_value("lovasz_stalled_total", {"phase": "send"})


def never() -> None:
    raise AssertionError("cut off")


def test_messages_are_passed_on(clock: Clock, metrics: Metrics) -> None:
    watch = SendWatch(10.0, metrics)
    assert list(watch.watched(iter(MESSAGES), never)) == MESSAGES
    watch.check()
    assert stalled(metrics) == 0


def test_an_answer_that_is_not_taken_is_cut_off_once(clock: Clock, metrics: Metrics) -> None:
    watch, cut_off = SendWatch(10.0, metrics), threading.Event()
    answer = watch.watched(MESSAGES, cut_off.set)
    next(answer)
    clock.now += 10
    watch.check()
    assert not cut_off.is_set()
    clock.now += 1
    watch.check()
    assert cut_off.is_set()
    assert stalled(metrics) == 1
    cut_off.clear()
    watch.check()
    assert not cut_off.is_set()
    assert stalled(metrics) == 1
    answer.close()


def test_of_several_only_those_that_stall_are_cut_off(clock: Clock, metrics: Metrics) -> None:
    watch, cut_off = SendWatch(10.0, metrics), []
    slow, quick, done = (
        watch.watched(MESSAGES, lambda name=name: cut_off.append(name)) for name in ("slow", "quick", "done")
    )
    next(slow)
    next(quick)
    clock.now += 11
    next(quick)
    list(done)
    watch.check()
    assert cut_off == ["slow"]
    assert stalled(metrics) == 1
    assert list(quick) == MESSAGES[2:]
    slow.close()


def test_an_answer_may_take_long_if_each_message_is_taken_in_time(clock: Clock, metrics: Metrics) -> None:
    watch = SendWatch(10.0, metrics)
    for _ in watch.watched(MESSAGES, never):
        clock.now += 9
        watch.check()
    assert stalled(metrics) == 0


def test_an_answer_that_is_not_begun_is_not_watched(clock: Clock, metrics: Metrics) -> None:
    watch = SendWatch(10.0, metrics)
    answer = watch.watched(MESSAGES, never)
    clock.now += 11
    watch.check()
    answer.close()


@pytest.mark.parametrize("taken", [1, 2])
def test_an_answer_that_is_closed_is_not_watched(clock: Clock, metrics: Metrics, taken: int) -> None:
    watch = SendWatch(10.0, metrics)
    answer = watch.watched(MESSAGES, never)
    for _ in range(taken):
        next(answer)
    answer.close()
    clock.now += 11
    watch.check()
    assert not watch._answers
    assert stalled(metrics) == 0


def test_an_answer_whose_making_fails_is_not_watched(clock: Clock, metrics: Metrics) -> None:
    def failing() -> Iterator[memoryview]:
        yield MESSAGES[0]
        raise RuntimeError("no more")

    watch = SendWatch(10.0, metrics)
    answer = watch.watched(failing(), never)
    next(answer)
    with pytest.raises(RuntimeError, match="no more"):
        next(answer)
    assert not watch._answers


def test_an_answer_that_is_cut_off_can_still_be_closed(clock: Clock, metrics: Metrics) -> None:
    watch, answers = SendWatch(10.0, metrics), []
    answer = watch.watched(MESSAGES, lambda: answers[0].close())
    answers.append(answer)
    next(answer)
    clock.now += 11
    watch.check()
    assert list(answer) == []
    assert stalled(metrics) == 1


class Context:
    """The connection of a call whose answer gRPC has."""

    def __init__(self) -> None:
        self.let_go: list[Callable[[], None]] = []
        self.is_cut_off = False

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self.let_go.append(callback)
        return True

    def cancel(self) -> None:
        self.is_cut_off = True
        self.let_go[0]()


def test_while_grpc_holds_little_room_is_given_back_before_the_answer_has_left(clock: Clock, metrics: Metrics) -> None:
    watch, given, contexts = SendWatch(10.0, metrics), [], [Context() for _ in range(3)]
    for number, context in enumerate(contexts):
        watch.hand_over(sending.MOST_UNSENT_BYTES // 2, cast("Any", context), partial(given.append, number))
    assert given == [0, 1]
    contexts[2].let_go[0]()
    assert given == [0, 1, 2]
    contexts[0].let_go[0]()
    watch.hand_over(1, cast("Any", Context()), partial(given.append, 3))
    assert given == [0, 1, 2, 3]


def test_an_answer_of_one_message_that_is_not_taken_is_cut_off(clock: Clock, metrics: Metrics) -> None:
    watch, given, context = SendWatch(10.0, metrics), [], Context()
    watch.hand_over(2 * sending.MOST_UNSENT_BYTES, cast("Any", context), partial(given.append, 0))
    clock.now += 11
    watch.check()
    assert context.is_cut_off
    assert given == [0]
    assert stalled(metrics) == 1
