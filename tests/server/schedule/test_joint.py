"""Joint steps on the server, from the service down: who belongs together, who is refused, who comes again."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
from support.desk import (
    ABORTED,
    CANCELLED,
    CLASSES,
    FAILED_PRECONDITION,
    NEVER,
    OK,
    RESOURCE_EXHAUSTED,
    SOFTMAX,
    UNAVAILABLE,
    Desk,
    DeskCarrier,
    Ended,
    Outcome,
    Rank,
    alone,
    assert_right,
    ended,
    ranks_of,
)
from support.waiting import eventually

from lovasz.server.schedule.joint import kept
from lovasz.server.schedule.joint import waiting as waiting_groups
from lovasz.server.transport.call import Call
from lovasz.spec import InvalidInput, LovaszSoftmax

# --- Who belongs together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_ranks_are_computed_as_one_request_in_their_order_whatever_the_order_of_arrival(
    desk: Desk, order: tuple[int, ...]
) -> None:
    desk.compute()
    ranks = [replace(rank, shape=(1 + rank.rank, CLASSES, 5, 4)) for rank in ranks_of(3)]
    calls: dict[int, Future[Outcome]] = {}
    for place, rank in enumerate(order):
        calls[rank] = desk.ask(ranks[rank])
        assert place == 2 or desk.waits_for(place + 1)
    for rank, call in calls.items():
        assert_right(call.result(60), rank, ranks)


def test_a_group_of_one_rank_waits_for_nobody(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(1)
    assert_right(desk.ask(ranks[0]).result(60), 0, ranks)


def test_images_of_other_sizes_belong_together_too(desk: Desk) -> None:
    desk.compute()
    ranks = [Rank(rank=rank, shape=shape) for rank, shape in enumerate([(1, CLASSES, 40, 30), (3, CLASSES, 7)])]
    for rank, outcome in enumerate(ended(*map(desk.ask, ranks))):
        assert_right(outcome, rank, ranks)


def test_training_and_evaluation_runs_and_steps_are_groups_of_their_own(desk: Desk) -> None:
    desk.compute()
    groups = [
        ranks_of(2, **options)
        for options in ({}, {"want_grad": False}, {"step": 1}, {"run": "other"}, {"run": "other", "step": 1})
    ]
    first = [desk.ask(ranks[0]) for ranks in groups]
    assert eventually(lambda: desk.joints.groups == 5)
    second = [desk.ask(ranks[1]) for ranks in groups]
    for ranks, *calls in zip(groups, first, second, strict=True):
        for rank, outcome in enumerate(ended(*calls)):
            assert_right(outcome, rank, ranks)


def test_a_run_that_starts_again_from_step_0_does_not_mind_its_old_groups(desk: Desk) -> None:
    desk.compute()
    old = [desk.ask(rank) for rank in ranks_of(3, step=57)[:2]]
    assert desk.waits_for(2)
    for step in range(3):
        ranks = ranks_of(3, step=step)
        for rank, outcome in enumerate(ended(*map(desk.ask, ranks))):
            assert_right(outcome, rank, ranks)
    assert desk.waits_for(2)
    again = desk.ask(ranks_of(3, step=57)[2])
    for rank, outcome in enumerate(ended(*old, again)):
        assert_right(outcome, rank, ranks_of(3, step=57))


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"world_size": 3}, "world_size is 3; the waiting ranks have 2"),
        ({"loss": LovaszSoftmax(ignore_index=7)}, r"loss is 1.0 \* .*ignore_index=7.*; the waiting ranks have 1.0 \* "),
        ({"loss": [(1.000000001, SOFTMAX)]}, r"loss is 1.000000001 \* .*; the waiting ranks have 1.0 \* "),
        ({"shape": (1, CLASSES + 1, 6)}, "channels is 4; the waiting ranks have 3"),
        ({"dtype": "float16"}, "element type of the logits is float16; the waiting ranks have float32"),
    ],
    ids=["world_size", "options", "weight", "channels", "type"],
)
def test_a_rank_that_differs_is_refused_with_the_difference_and_the_others_wait_on(
    desk: Desk, other: dict[str, Any], difference: str
) -> None:
    desk.compute()
    ranks = ranks_of(2)
    first = desk.ask(ranks[0])
    assert desk.waits_for(1)
    (refused,) = ended(desk.ask(replace(ranks[1], **other, call=b"other")))
    assert refused.code is FAILED_PRECONDITION
    with pytest.raises(AssertionError, match=f"rank 1 at step 0 of run 'run': {difference}"):
        raise AssertionError(refused.text)
    assert desk.admission.requests_in_flight == 2
    for rank, outcome in enumerate(ended(first, desk.ask(ranks[1]))):
        assert_right(outcome, rank, ranks)


def test_a_second_process_of_the_same_rank_is_refused(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(2)
    first = desk.ask(ranks[0])
    assert desk.waits_for(1)
    (refused,) = ended(desk.ask(ranks[0].again()))
    assert refused.code is FAILED_PRECONDITION
    assert "rank 0 at step 0 of run 'run' is there already, from another call" in refused.text
    for rank, outcome in enumerate(ended(first, desk.ask(ranks[1]))):
        assert_right(outcome, rank, ranks)


def test_calls_without_a_name_are_computed_and_not_kept(desk: Desk) -> None:
    desk.compute()
    for step in range(2):
        ranks = ranks_of(2, call=b"", step=step)
        for rank, outcome in enumerate(ended(*map(desk.ask, ranks))):
            assert_right(outcome, rank, ranks)
        assert desk.joints.kept == 0
        assert desk.admission.bytes_in_flight == 0
        assert not desk.pool.lent


def test_the_next_call_of_a_rank_drops_its_answers_and_no_others(desk: Desk) -> None:
    desk.compute()
    ended(*(desk.ask(rank) for run in ("a", "b") for rank in ranks_of(2, run=run)))
    assert desk.joints.kept == 4
    first = desk.ask(Rank(run="a", rank=0, step=1, blocking=True))
    assert desk.waits_for(1)
    assert desk.joints.kept == 3
    ended(first, desk.ask(Rank(run="a", rank=1, step=1, blocking=True)))
    assert desk.joints.kept == 4
    assert desk.joints._reclaim(None)
    assert not desk.joints._kept._calls


def test_a_second_call_without_a_name_is_another_call(desk: Desk) -> None:
    caller = DeskCarrier()
    first = desk.ask(Rank(call=b""), caller)
    assert desk.waits_for(1)
    assert ended(desk.ask(Rank(call=b"")))[0].code is FAILED_PRECONDITION
    caller.cancel()
    assert ended(first)[0].code is CANCELLED


# --- Who is missing -----------------------------------------------------------------------------------------------


def test_a_missing_rank_is_named_to_all_who_waited_for_it() -> None:
    desk = Desk(timeout=0.3)
    for outcome in ended(*(desk.ask(rank) for rank in ranks_of(5) if rank.rank not in (1, 3))):
        assert outcome.code is ABORTED
        assert "ranks 1, 3 of 5 did not arrive at step 0 of run 'run' within 0.3 s (--joint-timeout)" in outcome.text
    assert desk.admission.bytes_in_flight == 0
    desk.compute()
    ranks = ranks_of(5)
    for rank, outcome in enumerate(ended(*map(desk.ask, ranks))):
        assert_right(outcome, rank, ranks)
    desk.close()


def test_who_waits_elsewhere_in_the_run_is_named_too() -> None:
    desk = Desk(timeout=0.5)
    elsewhere = [desk.ask(Rank(rank=1, step=8)), desk.ask(Rank(rank=1, step=8, want_grad=False))]
    assert desk.waits_for(2)
    (outcome,) = ended(desk.ask(Rank(rank=0, step=7)))
    assert outcome.code is ABORTED
    assert "rank 1 of 2 did not arrive at step 7" in outcome.text
    ended(*elsewhere)
    desk.close()


def test_a_rank_that_still_sends_when_the_time_is_up_is_missing_and_is_told_so_when_it_has_sent() -> None:
    desk, go_on = Desk(timeout=0.3), threading.Event()
    late = desk.ask_in_stream(Rank(rank=1), go_on)
    assert eventually(lambda: desk.joints.groups == 1)
    (first,) = ended(desk.ask(Rank(rank=0)))
    assert "rank 1 of 2 did not arrive" in first.text
    go_on.set()
    (second,) = ended(late)
    assert (first.code, second.code) == (ABORTED, ABORTED)
    assert second.text == first.text
    desk.close()


def test_a_rank_that_leaves_frees_its_seat(desk: Desk) -> None:
    desk.compute()
    ranks, caller = ranks_of(3), DeskCarrier()
    stays, leaves = desk.ask(ranks[0]), desk.ask(ranks[1], caller)
    assert desk.waits_for(2)
    caller.cancel()
    assert ended(leaves)[0].code is CANCELLED
    assert desk.joints.waiting_ranks == 1
    for rank, outcome in enumerate(ended(stays, desk.ask(ranks[1].again()), desk.ask(ranks[2]))):
        assert_right(outcome, rank, ranks)


def test_a_group_that_all_have_left_is_gone_with_its_room(desk: Desk) -> None:
    callers = [DeskCarrier() for _ in range(3)]
    calls = [desk.ask(rank, caller) for rank, caller in zip(ranks_of(4), callers, strict=False)]
    assert desk.waits_for(3)
    assert desk.admission.requests_in_flight == 4
    for caller in callers:
        caller.cancel()
    assert [outcome.code for outcome in ended(*calls)] == [CANCELLED] * 3
    assert (desk.joints.groups, desk.admission.requests_in_flight, desk.admission.bytes_in_flight) == (0, 0, 0)


def test_a_rank_that_leaves_while_it_sends_frees_its_seat(desk: Desk) -> None:
    desk.compute()
    ranks, caller, never = ranks_of(2), DeskCarrier(), threading.Event()
    leaves = desk.ask_in_stream(ranks[0], never, caller)
    assert eventually(lambda: desk.joints.waiting_ranks == 1)
    stays = desk.ask(ranks[1])
    assert desk.waits_for(1)
    caller.cancel()
    assert ended(leaves)[0].code is CANCELLED
    for rank, outcome in enumerate(ended(desk.ask(ranks[0].again()), stays)):
        assert_right(outcome, rank, ranks)


def test_a_rank_that_leaves_a_complete_group_is_computed_with(desk: Desk) -> None:
    ranks, caller = ranks_of(2), DeskCarrier()
    calls = desk.ask(ranks[0], caller), desk.ask(ranks[1])
    assert eventually(lambda: len(desk.batcher) == 1)
    caller.cancel()
    desk.compute()
    gone, here = ended(*calls)
    assert gone.code is CANCELLED
    assert_right(here, 1, ranks)
    assert_right(desk.ask(ranks[0]).result(60), 0, ranks)


def test_a_complete_group_that_all_have_left_is_not_computed(desk: Desk) -> None:
    callers = [DeskCarrier(), DeskCarrier()]
    calls = [desk.ask(rank, caller) for rank, caller in zip(ranks_of(2), callers, strict=True)]
    assert eventually(lambda: len(desk.batcher) == 1)
    for caller in callers:
        caller.cancel()
    assert [outcome.code for outcome in ended(*calls)] == [CANCELLED] * 2
    assert len(desk.batcher) == 0
    assert not desk.pool.lent


def test_a_rank_for_which_there_is_no_memory_is_refused_and_frees_its_seat(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(2)
    first = desk.ask(ranks[0])
    assert desk.waits_for(1)
    desk.pool.has_memory = False
    (refused,) = ended(desk.ask(ranks[1]))
    assert refused.code is RESOURCE_EXHAUSTED
    assert "no memory left" in refused.text
    desk.pool.has_memory = True
    for rank, outcome in enumerate(ended(first, desk.ask(ranks[1]))):
        assert_right(outcome, rank, ranks)


# --- Calls that come again ----------------------------------------------------------------------------------------


def test_a_call_that_comes_again_while_the_old_one_waits_takes_its_place(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(2)
    old = desk.ask(ranks[0])
    assert desk.waits_for(1)
    new = desk.ask(ranks[0])
    (replaced,) = ended(old)
    assert (replaced.code, replaced.text) == (CANCELLED, "the same call came again")
    assert desk.waits_for(1)
    assert desk.admission.requests_in_flight == 2
    for rank, outcome in enumerate(ended(new, desk.ask(ranks[1]))):
        assert_right(outcome, rank, ranks)


def test_a_rank_that_comes_again_alone_keeps_the_room_of_its_group_also_while_the_server_drains() -> None:
    ranks = ranks_of(2)
    desk = Desk(budget=2 * ranks[0].nbytes)
    desk.compute()
    old = desk.ask(ranks[0])
    assert desk.waits_for(1)
    desk.admission.close()
    new = desk.ask(ranks[0])
    assert ended(old)[0].code is CANCELLED
    for rank, outcome in enumerate(ended(new, desk.ask(ranks[1]))):
        assert_right(outcome, rank, ranks)
    desk.close()


def test_a_call_that_comes_again_ends_the_old_one_that_still_sends(desk: Desk) -> None:
    desk.compute()
    ranks, never = ranks_of(2), threading.Event()  # Callers may stall forever here.
    old = desk.ask_in_stream(ranks[0], never)
    assert eventually(lambda: len(desk.pool.lent) == 1)
    new = desk.ask(ranks[0])
    (replaced,) = ended(old)
    assert replaced.code is CANCELLED
    assert desk.waits_for(1)
    assert len(desk.pool.lent) == 1
    for rank, outcome in enumerate(ended(new, desk.ask(ranks[1]))):
        assert_right(outcome, rank, ranks)


def test_a_call_that_comes_again_while_it_is_computed_gets_the_same_answer(desk: Desk) -> None:
    ranks = ranks_of(2)
    calls = [desk.ask(rank) for rank in ranks]
    assert eventually(lambda: len(desk.batcher) == 1)
    again = [desk.ask(ranks[0]) for _ in range(3)]
    threading.Event().wait(0.1)
    desk.compute()
    first, _ = ended(*calls)
    assert_right(first, 0, ranks)
    for outcome in ended(*again):
        assert outcome.code is OK
        assert outcome.grad == first.grad
        assert outcome.header.loss == first.header.loss


def test_a_call_whose_caller_left_before_its_turn_changes_nothing(desk: Desk) -> None:
    """It waited for its turn, and the attempt after it was faster."""
    desk.compute()
    ranks, gone = ranks_of(2), DeskCarrier()
    gone.cancel()
    live = desk.ask(ranks[0])
    assert desk.waits_for(1)
    assert ended(desk.ask(ranks[0], gone))[0].code is CANCELLED
    for rank, outcome in enumerate(ended(live, desk.ask(ranks[1]))):
        assert_right(outcome, rank, ranks)
    assert desk.joints.kept == 2
    assert ended(desk.ask(ranks[0].again(), gone))[0].code is CANCELLED
    assert desk.joints.kept == 2


def test_a_rank_whose_caller_leaves_with_its_tensors_aborts_no_step(desk: Desk) -> None:
    """A client that gives a call up in shared memory takes back the region next."""
    desk.compute()
    ranks, caller = ranks_of(2), DeskCarrier()
    other = desk.ask(ranks[1])
    assert desk.waits_for(1)

    def receive(_: object) -> None:
        caller.cancel()
        raise InvalidInput("shared_tensors.region", "got 7; expected the number of a region that is shared")

    with pytest.raises(Ended), Call(desk.service.pipeline, "SharedMemory", caller) as call:
        call.compute(call.read_header(ranks[0].request.to_proto()), receive)
    assert caller.code is CANCELLED
    for rank, outcome in enumerate(ended(desk.ask(ranks[0].again()), other)):
        assert_right(outcome, rank, ranks)


def test_a_call_that_comes_again_after_its_caller_has_left_gets_the_answer(desk: Desk) -> None:
    ranks, caller = ranks_of(2), DeskCarrier()
    calls = [desk.ask(ranks[0], caller), desk.ask(ranks[1])]
    assert eventually(lambda: len(desk.batcher) == 1)
    again = desk.ask(ranks[0])
    caller.cancel()
    desk.compute()
    assert ended(calls[0])[0].code is CANCELLED
    assert_right(again.result(60), 0, ranks)
    ended(calls[1])


def test_a_call_that_comes_again_while_its_answer_is_sent_does_not_wait_for_that(desk: Desk) -> None:
    """As where a connection was lost and the server does not know it yet."""
    desk.compute()
    ranks, go_on, caller = ranks_of(2), threading.Event(), DeskCarrier()
    go_on.set()
    other = desk.ask(ranks[1])
    sending = desk.stream(ranks[0], go_on, caller)
    next(sending)
    assert_right(desk.ask(ranks[0]).result(60), 0, ranks)
    desk.joints._reclaim(None)
    assert desk.pool.lent, "what is being sent stays"
    header, (_, grads) = ended(other)[0].header, alone(tuple(ranks_of(2, call=b"", run="")))
    assert b"".join(c for c in sending if isinstance(c, bytes)) == grads[0].tobytes()
    assert header.loss > 0


def test_a_call_that_comes_again_and_whose_group_failed_is_a_new_member(desk: Desk) -> None:
    desk.engine.memory_elements = 5
    ranks = ranks_of(2)
    calls = [desk.ask(rank) for rank in ranks]
    assert eventually(lambda: len(desk.batcher) == 1)
    again = desk.ask(ranks[0])
    threading.Event().wait(0.1)
    desk.compute()
    assert [outcome.code for outcome in ended(*calls)] == [RESOURCE_EXHAUSTED] * 2
    assert desk.waits_for(1)
    desk.engine.memory_elements = 10**9
    for rank, outcome in enumerate(ended(again, desk.ask(ranks[1]))):
        assert_right(outcome, rank, ranks)


def test_an_answer_can_be_had_again_until_its_rank_comes_with_its_next_step(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(2)
    first, second = ended(*map(desk.ask, ranks))
    assert desk.joints.kept == 2
    assert desk.admission.requests_in_flight == 0
    for _ in range(2):
        assert ended(desk.ask(ranks[0]))[0].grad == first.grad
    following = desk.ask(Rank(rank=0, step=1, blocking=True))
    assert desk.waits_for(1)
    assert desk.joints.kept == 1
    assert ended(desk.ask(ranks[1]))[0].grad == second.grad
    ended(following, desk.ask(Rank(rank=1, step=1)))


def test_a_rank_with_several_calls_at_a_time_can_ask_for_the_answer_to_an_earlier_one(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost with its connection, while the next call was made already."""
    desk.compute()
    ranks = ranks_of(2)
    first, _ = ended(*map(desk.ask, ranks))
    ended(desk.ask(Rank(rank=0, step=1)), desk.ask(Rank(rank=1, step=1)))
    assert ended(desk.ask(ranks[0]))[0].grad == first.grad
    monkeypatch.setattr(kept, "ASK_AGAIN_SECONDS", -1.0)
    ended(desk.ask(Rank(rank=0, step=2)), desk.ask(Rank(rank=1, step=2)))
    assert desk.joints.kept == 2


def test_an_answer_is_kept_for_a_while_only(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "KEPT_SECONDS", 0.0)
    desk.compute()
    ended(*map(desk.ask, ranks_of(2)))
    assert desk.joints.kept == 2
    desk.joints.check()
    assert desk.joints.kept == 0
    assert desk.admission.bytes_in_flight == 0


def test_an_answer_that_is_being_sent_is_kept_whatever_the_time(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "KEPT_SECONDS", 0.0)
    desk.compute()
    ranks, go_on = ranks_of(2), threading.Event()
    go_on.set()
    other = desk.ask(ranks[1])
    sending = desk.stream(ranks[0], go_on, DeskCarrier())
    next(sending)
    ended(other)
    desk.joints.check()
    assert_right(desk.ask(ranks[0]).result(60), 0, ranks)
    list(sending)


def test_a_name_that_was_used_for_another_call_brings_no_wrong_answer(desk: Desk) -> None:
    """As by a client that takes the same bytes for each call."""
    desk.compute()
    for options in ({}, {"step": 1}, {"run": "other"}, {"want_grad": False}, {"shape": (2, CLASSES, 9)}):
        ranks = ranks_of(2, call=b"1", **options)
        for rank, outcome in enumerate(ended(*map(desk.ask, ranks))):
            assert_right(outcome, rank, ranks)


# --- Room ---------------------------------------------------------------------------------------------------------


def test_the_first_rank_takes_room_for_all_and_the_others_need_none() -> None:
    ranks, strangers = ranks_of(2), ranks_of(2, run="other")
    desk = Desk(budget=2 * ranks[0].nbytes)
    desk.compute()
    first = desk.ask(ranks[0])
    assert desk.waits_for(1)
    (refused,) = ended(desk.ask(strangers[0]))
    assert refused.code is RESOURCE_EXHAUSTED
    assert int(refused.metadata["grpc-retry-pushback-ms"]) > 0
    for rank, outcome in enumerate(ended(first, desk.ask(ranks[1]))):
        assert_right(outcome, rank, ranks)
    for rank, outcome in enumerate(ended(*map(desk.ask, strangers))):
        assert_right(outcome, rank, strangers)
    desk.close()


def test_requests_are_reserved_for_all_too() -> None:
    desk = Desk(max_requests=3)
    desk.compute()
    ranks = ranks_of(2)
    first = desk.ask(ranks[0])
    assert desk.waits_for(1)
    assert "2 requests are in flight" in ended(desk.ask(Rank(run="other")))[0].text
    ended(first, desk.ask(ranks[1]))
    (never,) = ended(desk.ask(Rank(world_size=4)))
    assert never.code is RESOURCE_EXHAUSTED
    assert never.metadata["grpc-retry-pushback-ms"] == "-1000"
    assert "4 requests are needed together; the server holds 3 at most" in never.text
    desk.close()


def test_a_group_that_can_never_fit_is_told_so() -> None:
    desk = Desk(budget=3 * Rank().nbytes)
    (never,) = ended(desk.ask(Rank(world_size=4)))
    assert never.code is RESOURCE_EXHAUSTED
    assert "the tensors of the 4 requests take" in never.text
    assert never.metadata["grpc-retry-pushback-ms"] == "-1000"
    desk.close()


def test_ranks_that_come_after_one_that_can_never_fit_are_told_so() -> None:
    large = Rank(rank=1, world_size=3)
    desk = Desk(budget=2 * large.nbytes)
    desk.compute()
    (never,) = ended(desk.ask(large))
    assert never.code is RESOURCE_EXHAUSTED
    empty = [Rank(rank=rank, world_size=3, shape=(0, CLASSES, 6)) for rank in range(3)]
    for outcome in ended(desk.ask(empty[0]), desk.ask(empty[2])):
        assert (outcome.code, outcome.text) == (ABORTED, f"rank 1: {never.text}")
    again = [rank.again() for rank in empty]
    assert [outcome.code for outcome in ended(*map(desk.ask, again))] == [OK] * 3, "each is told once"
    waiting = desk.ask(replace(empty[0], step=1))
    assert desk.waits_for(1)
    texts = [outcome.text for outcome in ended(desk.ask(replace(large, step=1)), waiting)]
    assert texts == [never.text] * 2
    (late,) = ended(desk.ask(replace(empty[2], step=1)))
    assert (late.code, late.text) == (ABORTED, f"rank 1: {never.text}")
    desk.close()


def test_ranks_that_would_take_too_long_together_are_told_so() -> None:
    per_image = LovaszSoftmax(per_image=True)
    ranks = [Rank(rank=rank, world_size=3, loss=per_image, shape=(4, CLASSES, 6)) for rank in range(3)]
    desk = Desk(max_segments=2 * 4 * CLASSES)
    desk.compute()
    calls = [desk.ask(rank) for rank in ranks[:2]]
    assert desk.waits_for(2)
    outcomes = ended(*calls, desk.ask(ranks[2]))
    assert [outcome.code for outcome in outcomes] == [RESOURCE_EXHAUSTED] * 3
    assert all(f"3 of 3 ranks have {3 * 4 * CLASSES} segments" in outcome.text for outcome in outcomes)
    assert outcomes[2].metadata["grpc-retry-pushback-ms"] == "-1000"
    as_one = [replace(rank, step=1, loss=LovaszSoftmax()) for rank in ranks]
    assert [outcome.code for outcome in ended(*map(desk.ask, as_one))] == [OK] * 3, "one group in all"
    desk.close()


def test_broken_steps_cannot_fill_the_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting_groups, "_MOST_LINES", 2)
    desk, since = Desk(), time.monotonic()
    with caplog.at_level(logging.INFO, "lovasz.server.schedule.joint"):
        for step in range(50):
            assert desk.abort(Rank(step=step), "x" * 2000).code is OK
            waiting = desk.ask(Rank(step=1000 + step))
            assert desk.waits_for(1)
            desk.abort(Rank(rank=1, step=1000 + step), "no memory")
            ended(waiting)
    assert 2 <= len(caplog.records) <= 2 * (time.monotonic() - since + 1)
    desk.close()


def test_a_rank_that_is_larger_than_the_room_ends_its_group_for_all() -> None:
    small = Rank(rank=0, world_size=3)
    large = replace(small, rank=2, shape=(2, CLASSES, 6))
    for budget, comes_again in ((4 * small.nbytes, True), (4 * small.nbytes - 1, False)):
        desk = Desk(budget=budget)
        calls = [desk.ask(small), desk.ask(replace(small, rank=1))]
        assert desk.waits_for(2)
        with desk.admission.reserve(1):
            calls.append(desk.ask(large))
            outcomes = ended(*calls)
        assert [outcome.code for outcome in outcomes] == [RESOURCE_EXHAUSTED] * 3
        for outcome in outcomes:
            assert (float(outcome.metadata["grpc-retry-pushback-ms"]) > 0) is comes_again
            assert ("the tensors of the 3 requests take" in outcome.text) is not comes_again
        desk.close()


def test_the_room_of_a_small_rank_that_comes_again_is_given_away_only_once_its_group_is_complete() -> None:
    ranks = ranks_of(3)
    ranks[0] = replace(ranks[0], shape=(8, CLASSES, 100))
    desk, caller = Desk(budget=3 * ranks[0].nbytes), DeskCarrier()
    desk.compute()
    first = desk.ask(ranks[0])
    assert desk.waits_for(1)
    leaves = desk.ask(ranks[1], caller)
    assert desk.waits_for(2)
    assert ended(desk.ask(Rank(run="other")))[0].code is RESOURCE_EXHAUSTED
    caller.cancel()
    assert ended(leaves)[0].code is CANCELLED
    for rank, outcome in enumerate(ended(first, desk.ask(ranks[1]), desk.ask(ranks[2]))):
        assert_right(outcome, rank, ranks)
    assert desk.admission.bytes_in_flight == sum(rank.nbytes for rank in ranks)
    desk.close()


def test_kept_answers_make_room_for_bytes_but_not_in_vain_for_requests() -> None:
    ranks = ranks_of(2)
    desk = Desk(budget=2 * ranks[0].nbytes, max_requests=2)
    desk.compute()
    ended(*map(desk.ask, ranks))
    assert desk.joints.kept == 2
    assert desk.admission.bytes_in_flight == 2 * ranks[0].nbytes
    with desk.admission.reserve(0, 2):
        assert ended(desk.ask(Rank(run="other")))[0].code is RESOURCE_EXHAUSTED
        assert desk.joints.kept == 2
    strangers = ranks_of(2, run="other")
    for rank, outcome in enumerate(ended(*map(desk.ask, strangers))):
        assert_right(outcome, rank, strangers)
    desk.admission.close()
    assert desk.joints.kept == 2
    assert ended(desk.ask(Rank(run="third")))[0].code is UNAVAILABLE
    assert desk.joints.kept == 2
    desk.close()


# --- Stopping -----------------------------------------------------------------------------------------------------


def test_a_server_that_drains_completes_the_groups_that_it_has_and_takes_no_new_ones(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(2)
    first = desk.ask(ranks[0])
    assert desk.waits_for(1)
    desk.admission.close()
    assert ended(desk.ask(Rank(step=1)))[0].code is UNAVAILABLE
    for rank, outcome in enumerate(ended(first, desk.ask(ranks[1]))):
        assert_right(outcome, rank, ranks)


def lingers(desk: Desk, until: float) -> threading.Thread:
    """A server that stops now, and waits for ranks that may have lost their answers."""
    thread = threading.Thread(target=desk.joints.linger, args=(until,))
    thread.start()
    return thread


def test_a_server_that_drains_waits_for_ranks_that_may_have_lost_their_answers(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "ASK_AGAIN_SECONDS", NEVER)
    desk.compute()
    desk.joints.linger(time.monotonic() + NEVER)  # Nothing was answered yet.
    ranks = ranks_of(2)
    before = ended(*map(desk.ask, ranks))
    desk.admission.close()
    waiting = lingers(desk, time.monotonic() + NEVER)
    assert ended(desk.ask(ranks[0]))[0].grad == before[0].grad
    for rank in range(2):
        assert waiting.is_alive()
        assert ended(desk.ask(Rank(rank=rank, step=1, blocking=True)))[0].code is UNAVAILABLE
    waiting.join(60)  # Ranks that come with the next step have received their answers.
    assert not waiting.is_alive()


def test_a_server_that_drains_does_not_wait_for_lost_answers_for_long(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.compute()
    ended(*map(desk.ask, ranks_of(2)))
    desk.admission.close()
    monkeypatch.setattr(kept, "ASK_AGAIN_SECONDS", NEVER)
    desk.joints.linger(time.monotonic() + 0.1)
    monkeypatch.setattr(kept, "ASK_AGAIN_SECONDS", 0.1)
    desk.joints.linger(time.monotonic() + NEVER)
    assert desk.joints.kept == 2


def test_ranks_that_wait_when_the_server_ends_are_told_so(desk: Desk) -> None:
    calls = [desk.ask(rank) for rank in ranks_of(3)[:2]]
    assert desk.waits_for(2)
    desk.admission.close()
    desk.joints.stop()
    for outcome in ended(*calls):
        assert outcome.code is UNAVAILABLE
        assert outcome.text == "the server is stopping, and rank 2 of 3 did not arrive at step 0 of run 'run'"


def test_a_group_that_is_complete_after_the_queue_is_closed_is_told_so(desk: Desk) -> None:
    first = desk.ask(Rank(rank=0))
    assert desk.waits_for(1)
    desk.batcher.close()
    assert [outcome.code for outcome in ended(first, desk.ask(Rank(rank=1)))] == [UNAVAILABLE] * 2
