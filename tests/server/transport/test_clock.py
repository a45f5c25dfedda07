"""The clock of a call: which phases count, and for how long."""

from __future__ import annotations

import numpy as np
import pytest
from support.clock import Clock

from lovasz.server.observe.metrics import Phase
from lovasz.server.schedule.job import Answer
from lovasz.server.transport import clock as clock_module
from lovasz.server.transport.clock import CallClock
from lovasz.spec import Result


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    time = Clock()
    monkeypatch.setattr(clock_module, "time", time)
    return time


def answer(started: float) -> Answer:
    result = Result(0.5, None, (), np.zeros(0, np.int64), np.zeros(0, np.int64))
    return Answer(result, 1.0, started, compute_seconds=3.0, copy_seconds=0.5, batch_requests=2)


def test_each_phase_has_its_time_and_the_caller_is_told_it(time: Clock) -> None:
    clock = CallClock()
    time.now += 1
    clock.enter(Phase.JOINT)
    time.now += 10
    clock.enter(Phase.QUEUE, at=1004.0)
    clock.answered(answer(started=1006.0))
    time.now += 2
    assert clock.phase is Phase.SEND
    assert clock.stop() == 13
    assert clock.seconds == {
        Phase.RECEIVE: 1,
        Phase.JOINT: 3,
        Phase.QUEUE: 2,
        Phase.COMPUTE: 3.0,
        Phase.COPY: 0.5,
        Phase.SEND: 2,
    }
    timing = clock.timing(answer(started=1006.0))
    assert (timing.receive_seconds, timing.joint_wait_seconds, timing.queue_seconds) == (1, 3, 2)
    assert (timing.compute_seconds, timing.copy_seconds, timing.batch_requests) == (3.0, 0.5, 2)


def test_a_kept_answer_is_only_sent(time: Clock) -> None:
    clock = CallClock()
    time.now += 1
    clock.skip_to(Phase.SEND)
    time.now += 2
    assert clock.stop() == 3
    assert clock.seconds == {Phase.SEND: 2}
    assert clock.timing(answer(started=500.0)).queue_seconds == 0


def test_a_failed_computation_counts_as_computing_from_the_start_of_its_batch(time: Clock) -> None:
    clock = CallClock()
    clock.enter(Phase.QUEUE)
    time.now += 5
    clock.failed(batch_started=1001.0)
    clock.stop()
    assert clock.seconds == {Phase.RECEIVE: 0, Phase.QUEUE: 1, Phase.COMPUTE: 4}


@pytest.mark.parametrize(("phase", "started"), [(Phase.QUEUE, None), (Phase.JOINT, 1001.0)])
def test_a_failure_before_the_batch_leaves_the_phase_as_it_is(time: Clock, phase: Phase, started: float | None) -> None:
    clock = CallClock()
    clock.enter(phase)
    clock.failed(started)
    assert clock.phase is phase


def test_a_phase_that_ends_before_it_began_takes_no_time(time: Clock) -> None:
    """As where a step was complete before the last bytes of this rank were noticed."""
    clock = CallClock()
    time.now += 2
    clock.enter(Phase.JOINT)
    clock.enter(Phase.QUEUE, at=1001.0)
    assert clock.seconds == {Phase.RECEIVE: 2, Phase.JOINT: 0}
