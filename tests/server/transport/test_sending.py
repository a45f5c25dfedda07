"""The watch over answers: it passes them on, and cuts off those whose callers do not take them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import pytest
from support.clock import Clock

from lovasz.server.observe.metrics import Metrics
from lovasz.server.transport import sending
from lovasz.server.transport.carrier import Carrier
from lovasz.server.transport.sending import SendWatch

MESSAGES = [memoryview(b"one"), memoryview(b"two"), memoryview(b"three")]


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


class Context:
    """The connection of a call whose answer is sent: what gRPC's own does.

    Attributes:
        is_cut_off: whether the watch has ended the call.
    """

    def __init__(self, cut_off: Callable[[], object] | None = None) -> None:
        self._callbacks: list[Callable[[], None]] | None = []
        self._cut_off = cut_off
        self.is_cut_off = False

    def add_callback(self, callback: Callable[[], None]) -> bool:
        if self._callbacks is None:
            return False
        self._callbacks.append(callback)
        return True

    def let_go(self) -> None:
        """The call has ended, and its last bytes have left."""
        callbacks, self._callbacks = self._callbacks, None
        for callback in callbacks or ():
            callback()

    def cancel(self) -> None:
        self.is_cut_off = True
        if self._cut_off is not None:
            self._cut_off()
        self.let_go()

    @property
    def carrier(self) -> Carrier:
        return cast("Carrier", self)


def test_messages_are_passed_on(clock: Clock, metrics: Metrics) -> None:
    watch, context = SendWatch(10.0, metrics), Context()
    assert list(watch.watched(iter(MESSAGES), context.carrier)) == MESSAGES
    watch.check()
    assert not context.is_cut_off
    assert stalled(metrics) == 0


def test_an_answer_that_is_not_taken_is_cut_off_once(clock: Clock, metrics: Metrics) -> None:
    watch, context = SendWatch(10.0, metrics), Context()
    answer = watch.watched(MESSAGES, context.carrier)
    next(answer)
    clock.now += 10
    watch.check()
    assert not context.is_cut_off
    clock.now += 1
    watch.check()
    assert context.is_cut_off
    assert stalled(metrics) == 1
    context.is_cut_off = False
    watch.check()
    assert not context.is_cut_off
    assert stalled(metrics) == 1
    answer.close()


def test_of_several_only_those_that_stall_are_cut_off(clock: Clock, metrics: Metrics) -> None:
    watch, contexts = SendWatch(10.0, metrics), [Context() for _ in range(3)]
    slow, quick, done = (watch.watched(MESSAGES, context.carrier) for context in contexts)
    next(slow)
    next(quick)
    clock.now += 11
    next(quick)
    list(done)
    watch.check()
    assert [context.is_cut_off for context in contexts] == [True, False, False]
    assert stalled(metrics) == 1
    assert list(quick) == MESSAGES[2:]
    slow.close()


def test_an_answer_may_take_long_if_each_message_is_taken_in_time(clock: Clock, metrics: Metrics) -> None:
    watch, context = SendWatch(10.0, metrics), Context()
    for _ in watch.watched(MESSAGES, context.carrier):
        clock.now += 9
        watch.check()
    assert not context.is_cut_off
    assert stalled(metrics) == 0


def test_an_answer_that_is_not_begun_is_not_watched(clock: Clock, metrics: Metrics) -> None:
    watch, context = SendWatch(10.0, metrics), Context()
    answer = watch.watched(MESSAGES, context.carrier)
    clock.now += 11
    watch.check()
    assert not context.is_cut_off
    assert watch.wait_until_sent(0.0) == 0
    answer.close()


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_an_answer_is_watched_until_the_transport_lets_go_of_it(clock: Clock, metrics: Metrics, taken: int) -> None:
    """Its last message waits for its caller like the others; a call that ends early ends the answer."""
    watch, contexts = SendWatch(10.0, metrics), [Context() for _ in range(2)]
    for context in contexts:
        answer = watch.watched(MESSAGES, context.carrier)
        for _ in range(taken):
            next(answer)
        answer.close()
    contexts[0].let_go()
    assert watch.wait_until_sent(0.0) == 1
    clock.now += 11
    watch.check()
    assert [context.is_cut_off for context in contexts] == [False, True]
    assert stalled(metrics) == 1
    assert watch.wait_until_sent(0.0) == 0


def test_the_answer_of_a_call_that_has_ended_is_not_watched(clock: Clock, metrics: Metrics) -> None:
    watch, context = SendWatch(10.0, metrics), Context()
    context.let_go()
    next(watch.watched(MESSAGES, context.carrier))
    watch.hand_over(1, context.carrier, int)
    assert watch.wait_until_sent(0.0) == 0
    clock.now += 11
    watch.check()
    assert stalled(metrics) == 0


def test_an_answer_whose_making_fails_ends_with_its_call(clock: Clock, metrics: Metrics) -> None:
    def failing() -> Iterator[memoryview]:
        yield MESSAGES[0]
        raise RuntimeError("no more")

    watch, context = SendWatch(10.0, metrics), Context()
    answer = watch.watched(failing(), context.carrier)
    next(answer)
    with pytest.raises(RuntimeError, match="no more"):
        next(answer)
    context.let_go()
    assert watch.wait_until_sent(0.0) == 0


def test_an_answer_that_is_cut_off_can_still_be_closed(clock: Clock, metrics: Metrics) -> None:
    watch, answers = SendWatch(10.0, metrics), []
    answer = watch.watched(MESSAGES, Context(lambda: answers[0].close()).carrier)
    answers.append(answer)
    next(answer)
    clock.now += 11
    watch.check()
    assert list(answer) == []
    assert stalled(metrics) == 1


def test_while_grpc_holds_little_room_is_given_back_before_the_answer_has_left(clock: Clock, metrics: Metrics) -> None:
    watch, given, contexts = SendWatch(10.0, metrics), [], [Context() for _ in range(3)]
    for number, context in enumerate(contexts):
        watch.hand_over(sending.MOST_UNSENT_BYTES // 2, context.carrier, partial(given.append, number))
    assert given == [0, 1]
    contexts[2].let_go()
    assert given == [0, 1, 2]
    contexts[0].let_go()
    watch.hand_over(1, Context().carrier, partial(given.append, 3))
    assert given == [0, 1, 2, 3]


def test_an_answer_of_one_message_that_is_not_taken_is_cut_off(clock: Clock, metrics: Metrics) -> None:
    watch, given, context = SendWatch(10.0, metrics), [], Context()
    watch.hand_over(2 * sending.MOST_UNSENT_BYTES, context.carrier, partial(given.append, 0))
    clock.now += 11
    watch.check()
    assert context.is_cut_off
    assert given == [0]
    assert stalled(metrics) == 1


@pytest.mark.parametrize("by", ["the transport", "the watch"])
def test_answers_that_are_on_their_way_are_waited_for(clock: Clock, metrics: Metrics, by: str) -> None:
    watch, contexts = SendWatch(10.0, metrics), [Context() for _ in range(2)]
    next(watch.watched(MESSAGES, contexts[0].carrier))
    watch.hand_over(1, contexts[1].carrier, int)
    assert watch.wait_until_sent(0.01) == 2
    left: list[int] = []
    waiting = threading.Thread(target=lambda: left.append(watch.wait_until_sent(60.0)))
    waiting.start()
    if by == "the transport":
        contexts[1].let_go()
        assert left == []
        contexts[0].let_go()
    else:
        clock.now += 11
        watch.check()
    waiting.join(60)
    assert left == [0]
