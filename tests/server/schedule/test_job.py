"""A job and its callers: who gets an answer, who leaves, and what is computed for those who stay."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from functools import partial

import numpy as np
import pytest
import torch

from lovasz.core.batch import Request
from lovasz.server.errors import AbandonedError, ExpiredError
from lovasz.server.schedule.batcher import Batcher
from lovasz.server.schedule.job import Answer, Caller, Job, cost_of
from lovasz.spec import LovaszSoftmax, Result, weighted_sum

SOFTMAX = weighted_sum(LovaszSoftmax())
ELEMENTS = 3 * 6
"""Logits of each request."""
NONE = np.zeros(0, np.int64)
PAST, FUTURE = -1.0, 3600.0


def job(callers: int = 1, deadlines: Sequence[float | None] = ()) -> Job:
    """A job of several callers, whose deadlines are so many seconds from now."""
    now = time.monotonic()
    request = Request.checked(torch.zeros(1, 3, 6), torch.zeros(1, 6, dtype=torch.uint8), SOFTMAX)
    cost, given = cost_of(request.layout.elements, SOFTMAX.segments(request.layout)), deadlines or [None] * callers
    return Job(
        tuple(Caller(request, cost, None if seconds is None else now + seconds) for seconds in given),
        SOFTMAX,
        want_grad=True,
    )


def assert_cancelled(caller: Caller) -> None:
    with pytest.raises(CancelledError):
        caller.wait(timeout_seconds=0)


def test_a_caller_that_goes_while_its_request_is_computed_tells_whom_it_concerns() -> None:
    one, told = job(), list[bool]()
    (caller,) = one.callers
    one.when_left = lambda: told.append(caller.departure.happened)
    assert one.claim()
    one.leave(caller)
    assert told == [True]
    assert not caller.answered


def test_a_caller_that_goes_before_anybody_wants_to_be_told_is_remembered() -> None:
    one = job()
    assert one.claim()
    one.leave(one.callers[0])
    assert one.callers[0].departure.happened


def test_a_caller_that_goes_while_its_request_waits_cancels_it() -> None:
    one = job()
    one.leave(one.callers[0])
    assert_cancelled(one.callers[0])
    assert not one.claim()


def test_a_job_costs_what_the_requests_of_all_its_callers_do() -> None:
    first = job(callers=2)
    assert first.elements == 2 * ELEMENTS
    queue = Batcher(2 * ELEMENTS, 100, FUTURE)
    queue.put(first)
    queue.put(job(callers=2))
    assert queue.take(idle=True) == [first]


def test_a_job_is_computed_until_its_last_caller_leaves() -> None:
    one, told = job(callers=3), list[list[bool]]()
    for caller in one.callers[:2]:
        one.leave(caller)
        assert not caller.answered
    assert one.claim()
    one.when_left = lambda: told.append([caller.departure.happened for caller in one.callers])
    one.leave(one.callers[2])
    assert told == [[True, True, True]]


def test_a_job_that_all_callers_leave_is_cancelled_for_all() -> None:
    one = job(callers=2)
    for caller in one.callers:
        one.leave(caller)
    for caller in one.callers:
        assert_cancelled(caller)
    assert not one.claim()


@pytest.mark.parametrize("in_time", [FUTURE, None])
def test_a_caller_whose_deadline_has_passed_does_not_keep_the_others_from_their_answer(in_time: float | None) -> None:
    one = job(deadlines=(PAST, in_time))
    assert one.claim()
    assert not any(caller.answered for caller in one.callers)


def test_a_job_is_not_computed_once_all_deadlines_have_passed() -> None:
    one = job(deadlines=(PAST, PAST))
    assert not one.claim()
    for caller in one.callers:
        with pytest.raises(ExpiredError, match="the deadline passed while the request was waiting for the device"):
            caller.wait(timeout_seconds=0)


def test_a_job_that_is_claimed_while_all_are_leaving_is_computed_or_given_up_as_a_whole() -> None:
    for _ in range(300):
        one, start = job(callers=3), threading.Barrier(4)

        def leave(caller: Caller, one: Job = one, start: threading.Barrier = start) -> None:
            start.wait()
            one.leave(caller)

        threads = [threading.Thread(target=leave, args=(caller,)) for caller in one.callers]
        for thread in threads:
            thread.start()
        start.wait()
        claimed = one.claim()
        for thread in threads:
            thread.join()
        assert {caller.answered for caller in one.callers} == {not claimed}


def test_a_caller_is_answered_once() -> None:
    (caller,) = job().callers
    caller.refuse(AbandonedError("first"))
    caller.refuse(AbandonedError("second"))
    with pytest.raises(AbandonedError, match="first"):
        caller.wait(timeout_seconds=0)


@pytest.mark.parametrize("is_answered", [True, False])
def test_a_caller_waits_until_it_hears(is_answered: bool) -> None:
    one = job()
    (caller,) = one.callers
    with pytest.raises(TimeoutError):
        caller.wait(timeout_seconds=0)
    given = Answer(Result(0.5, None, (), NONE, NONE), 1.0, 0.0, compute_seconds=1.0, copy_seconds=0.0, batch_requests=1)
    tell = partial(caller.answer, given) if is_answered else partial(one.leave, caller)
    timer = threading.Timer(0.05, tell)
    timer.start()
    if is_answered:
        assert caller.wait(timeout_seconds=30) is given
        assert caller.wait() is given
    else:
        with pytest.raises(CancelledError):
            caller.wait(timeout_seconds=30)
    timer.join()


def test_callers_hear_whether_they_wait_before_or_after() -> None:
    for _ in range(300):
        one, start, heard = job(), threading.Barrier(2), list[Exception]()
        (caller,) = one.callers

        def wait(caller: Caller = caller, start: threading.Barrier = start, heard: list[Exception] = heard) -> None:
            start.wait()
            with pytest.raises(AbandonedError) as caught:
                caller.wait(timeout_seconds=30)
            heard.append(caught.value)

        waiting = threading.Thread(target=wait)
        waiting.start()
        start.wait()
        caller.refuse(AbandonedError())
        waiting.join()
        assert len(heard) == 1


def test_each_caller_raises_an_error_of_its_own() -> None:
    one, error = job(callers=2), AbandonedError("gone")
    one.refuse(error)
    raised = []
    for caller in one.callers:
        with pytest.raises(AbandonedError, match="gone") as caught:
            caller.wait()
        raised.append(caught.value)
    assert raised[0] is not raised[1]
    assert error.__traceback__ is None
