"""Several servers: ranks that wait are asked to call again, so that those who reached different servers meet."""

from __future__ import annotations

import threading
from typing import Any, cast

from support.desk import ABORTED, UNAVAILABLE, Desk, Rank, assert_right, ended, ranks_of
from support.waiting import eventually

from lovasz.server.observe.metrics import JointOutcome
from lovasz.server.schedule.joint.group import Group, Step
from lovasz.server.schedule.joint.regrouping import Regrouping


def checked_until(desk: Desk, holds: Any) -> bool:
    """Whether something holds within half a minute in which the table does its chores."""

    def now() -> bool:
        desk.joints.check()
        return bool(holds())

    return eventually(now)


def test_ranks_that_wait_are_asked_to_call_again_and_meet() -> None:
    desk = Desk(regroup=0.05)
    ranks = ranks_of(3)
    waiting = [desk.ask(rank) for rank in ranks[:2]]
    assert desk.waits_for(2)
    assert checked_until(desk, lambda: desk.joints.groups == 0)
    for outcome in ended(*waiting):
        assert outcome.code is UNAVAILABLE, "clients repeat such calls until their timeout"
        assert outcome.metadata == {"grpc-retry-pushback-ms": "100"}
        assert "rank 2 of 3 did not arrive at step 0 of run 'run': other ranks may have" in outcome.text
    assert desk.admission.bytes_in_flight == 0
    desk.compute()
    for rank, outcome in enumerate(ended(*map(desk.ask, ranks))):
        assert_right(outcome, rank, ranks)
    desk.close()


def test_a_dead_rank_is_named_after_the_timeout_of_the_step_though_others_call_again_and_again() -> None:
    desk = Desk(timeout=3.0, regroup=0.02)
    codes = []
    for _ in range(100):
        call = desk.ask(Rank(rank=0))
        assert checked_until(desk, call.done)
        codes.append(call.result().code)
        if codes[-1] is not UNAVAILABLE:
            break
    assert codes[0] is UNAVAILABLE
    assert codes[-1] is ABORTED
    assert len(codes) <= 9, "asked after 0.02, 0.06, 0.14, ... 2.54 s: each time after twice as long"
    assert "rank 1 of 2 did not arrive at step 0 of run 'run' within 3 s (--joint-timeout)" in call.result().text
    desk.close()


def test_a_payload_that_is_on_its_way_is_not_sent_again() -> None:
    desk, go_on = Desk(regroup=0.001), threading.Event()
    ranks = ranks_of(2)
    desk.compute()
    sends = desk.ask_in_stream(ranks[0], go_on)
    assert eventually(lambda: desk.joints.groups == 1)
    other = desk.ask(ranks[1])
    assert desk.waits_for(1)
    assert checked_until(desk, lambda: next(iter(desk.joints.waiting_steps())).seconds > 0.01)
    assert desk.joints.groups == 1
    go_on.set()
    for rank, outcome in enumerate(ended(sends, other)):
        assert_right(outcome, rank, ranks)
    desk.close()


def group(regrouping: Regrouping, step: Step) -> Group:
    """One that a first rank begins now."""
    return Group(
        step=step,
        first=Rank().request,
        world_size=2,
        absent=set(),
        share=0,
        permit=cast("Any", None),
        deadline=0.0,
        since=regrouping.since(step),
    )


def test_each_time_comes_after_twice_as_long_until_the_step_ends() -> None:
    regrouping, step = Regrouping(5.0, timeout_seconds=1000.0), Step("run", 0, True)
    first = group(regrouping, step)
    asked_after = []
    waiting = first
    for seconds in range(100):
        for due in regrouping.due([waiting], first.since + seconds):
            asked_after.append(seconds)
            regrouping.ended(due, JointOutcome.REGROUPED)
            waiting = group(regrouping, step)
            assert waiting.since == first.since
    assert asked_after == [5, 15, 35, 75]
    regrouping.ended(waiting, JointOutcome.COMPLETED)
    assert group(regrouping, step).since > first.since


def test_a_step_whose_ranks_have_gone_elsewhere_is_forgotten() -> None:
    regrouping, step = Regrouping(5.0, timeout_seconds=45.0), Step("run", 0, True)
    gone = group(regrouping, step)
    regrouping.ended(gone, JointOutcome.REGROUPED)
    regrouping.due([], gone.since + 44)
    assert group(regrouping, step).since == gone.since
    regrouping.due([], gone.since + 46)
    assert group(regrouping, step).since > gone.since


def test_without_the_option_nobody_is_asked() -> None:
    regrouping, step = Regrouping(0.0, timeout_seconds=45.0), Step("run", 0, True)
    waits = group(regrouping, step)
    assert regrouping.due([waits], waits.since + 40) == []
