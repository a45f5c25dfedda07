"""Joint steps in which ranks have no images, cannot take part, have left the run, or wait at different steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from support.desk import (
    ABORTED,
    CLASSES,
    FAILED_PRECONDITION,
    INVALID_ARGUMENT,
    OK,
    RESOURCE_EXHAUSTED,
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

from lovasz import wire
from lovasz.core import compute
from lovasz.server.schedule.joint import aborted, attendance, out_of_step
from lovasz.server.schedule.joint.attendance import Attendance
from lovasz.server.schedule.joint.group import Run, Step
from lovasz.spec import LossLike, LovaszHinge, LovaszSoftmax
from lovasz.v1 import loss_pb2 as pb
from lovasz.wire import framing

NOTHING = (0, CLASSES, 6)


def run_in_full(desk: Desk, ranks: list[Rank]) -> None:
    """A step of all these ranks, with the answer that one request of all their images would get."""
    for place, outcome in enumerate(ended(*map(desk.ask, ranks))):
        assert_right(outcome, place, ranks)


# --- Ranks without images -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("loss", [LovaszSoftmax(), LovaszSoftmax(per_image=True)], ids=["batch", "per image"])
def test_a_rank_without_images_gets_what_the_others_would_get_without_it(
    desk: Desk, loss: LossLike, dtype: str
) -> None:
    desk.compute()
    ranks = ranks_of(3, loss=loss, dtype=dtype, shape=(2, CLASSES, 6))
    ranks[1] = replace(ranks[1], shape=NOTHING)
    outcomes = ended(*map(desk.ask, ranks))
    filled = [ranks[0], ranks[2]]
    whole = compute(torch.cat([one.logits for one in filled]), torch.cat([one.labels for one in filled]), loss)
    for outcome, rank in zip(outcomes, ranks, strict=True):
        assert outcome.code is OK, outcome.text
        assert outcome.header.loss == whole.loss
        assert outcome.gradient.shape == rank.shape
        assert outcome.header.ranks == 3
    assert outcomes[0].header.grad_scale == outcomes[1].header.grad_scale


def test_a_step_whose_ranks_all_have_no_images_has_the_loss_0(desk: Desk) -> None:
    desk.compute()
    for dtype in ("float32", "float16"):
        for outcome in ended(*map(desk.ask, ranks_of(2, shape=NOTHING, run=dtype, dtype=dtype))):
            assert (outcome.code, outcome.header.loss, outcome.gradient.shape) == (OK, 0.0, NOTHING)


def test_of_one_image_and_none_the_hinge_is_that_of_the_image(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(2, loss=LovaszHinge(), shape=(1, 1, 8))
    ranks[0] = replace(ranks[0], shape=(0, 1, 8))
    outcomes = ended(*map(desk.ask, ranks))
    loss = compute(ranks[1].logits, ranks[1].labels, LovaszHinge()).loss
    assert [outcome.header.loss for outcome in outcomes] == [loss, loss]


def test_a_request_without_images_that_is_no_rank_is_refused(desk: Desk) -> None:
    message = wire.Request.to_proto(Rank().request)
    message.ClearField("joint")
    message.logits.shape[0] = message.labels.shape[0] = 0
    with pytest.raises(ValueError, match=r"logits: got shape \(0, 3, 6\), which holds no element"):
        wire.Request.from_proto(message)


def test_images_without_pixels_are_refused_also_in_a_joint_step() -> None:
    message = wire.Request.to_proto(Rank().request)
    message.logits.shape[2] = message.labels.shape[1] = 0
    with pytest.raises(ValueError, match=r"logits: got shape \(1, 3, 0\), which holds no element"):
        wire.Request.from_proto(message)


def test_a_rank_whose_labels_are_invalid_is_named_by_its_number(desk: Desk) -> None:
    desk.compute()
    desk.leave(Rank(rank=0, world_size=4))
    ranks = [replace(rank, shape=NOTHING) if rank.rank == 1 else rank for rank in ranks_of(4)]
    ranks[3] = replace(ranks[3], label=9)
    outcomes = ended(*map(desk.ask, ranks[1:]))
    assert [outcome.code for outcome in outcomes[:2]] == [ABORTED] * 2
    for outcome in outcomes[:2]:
        assert outcome.text.startswith("rank 3: labels: got 9 at index [0, 0]")


def test_the_first_rank_with_images_takes_room_for_all() -> None:
    ranks = ranks_of(3)
    ranks[0] = replace(ranks[0], shape=NOTHING)
    desk, caller = Desk(budget=3 * ranks[1].nbytes), DeskCarrier()
    first = desk.ask(ranks[0], caller)
    assert desk.waits_for(1)
    assert desk.admission.bytes_in_flight == 0
    second = desk.ask(ranks[1])
    assert desk.waits_for(2)
    assert desk.admission.bytes_in_flight == 3 * ranks[1].nbytes
    caller.cancel()
    ended(first)
    assert desk.admission.bytes_in_flight == 3 * ranks[1].nbytes
    desk.compute()
    outcomes = ended(second, desk.ask(ranks[0].again()), desk.ask(ranks[2]))
    assert [outcome.code for outcome in outcomes] == [OK] * 3
    desk.close()


def test_a_rank_with_images_that_finds_no_room_ends_the_step_of_those_without() -> None:
    rank = Rank(rank=1)
    desk = Desk(budget=2 * rank.nbytes)
    first = desk.ask(Rank(rank=0, shape=NOTHING))
    assert desk.waits_for(1)
    with desk.admission.reserve(1):
        outcomes = ended(first, desk.ask(rank))
    assert [outcome.code for outcome in outcomes] == [RESOURCE_EXHAUSTED] * 2
    assert desk.admission.bytes_in_flight == 0
    desk.close()


def test_the_share_of_missing_ranks_is_for_those_that_come_after_the_first_one_with_images() -> None:
    filled = Rank(rank=2, world_size=3)
    empty = [Rank(rank=rank, world_size=3, shape=NOTHING) for rank in (0, 1)]
    desk = Desk(budget=3 * filled.nbytes, share=0.3)
    desk.compute()
    waiting = [desk.ask(rank) for rank in empty]
    assert desk.waits_for(2)
    assert [outcome.code for outcome in ended(*waiting, desk.ask(filled))] == [OK] * 3
    first = desk.ask(replace(empty[0], step=1))
    assert desk.waits_for(1)
    for outcome in ended(first, desk.ask(replace(filled, step=1))):
        assert outcome.code is RESOURCE_EXHAUSTED
        assert "1 rank with 150 B is missing; those of one run may hold 0.3 (--joint-share)" in outcome.text
        assert outcome.metadata["grpc-retry-pushback-ms"] == "-1000", "no room will ever be there"
    desk.close()


def test_ranks_without_images_that_one_with_images_can_never_fit_beside_are_told_so() -> None:
    filled = Rank(rank=1)
    desk = Desk(budget=2 * filled.nbytes - 1)
    first = desk.ask(Rank(rank=0, shape=NOTHING))
    assert desk.waits_for(1)
    for outcome in ended(first, desk.ask(filled)):
        assert "the tensors of the 2 requests take" in outcome.text
        assert outcome.metadata["grpc-retry-pushback-ms"] == "-1000"
    desk.close()


# --- Ranks that cannot take part ----------------------------------------------------------------------------------


def test_a_rank_that_cannot_take_part_ends_the_step_for_those_that_wait_and_those_that_come_later(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(4)
    waiting, go_on = desk.ask(ranks[0]), threading.Event()
    late = desk.ask_in_stream(ranks[1], go_on)
    assert desk.waits_for(1)
    assert eventually(lambda: desk.joints.waiting_ranks == 2)
    assert desk.abort(ranks[2], "labels: got text").code is OK
    go_on.set()
    for outcome in ended(waiting, late, desk.ask(ranks[3])):
        assert (outcome.code, outcome.text) == (ABORTED, "rank 2: labels: got text")
    assert desk.admission.requests_in_flight == 0
    run_in_full(desk, [rank.again() for rank in ranks])


def test_each_rank_is_told_once_so_that_all_skip_the_same_batch(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(3)
    desk.abort(ranks[1], "reason")
    assert ended(desk.ask(ranks[0]))[0].code is ABORTED
    again = [desk.ask(rank.again()) for rank in ranks[:2]]
    assert desk.waits_for(2)
    assert ended(desk.ask(ranks[2]))[0].code is ABORTED
    for place, outcome in enumerate(ended(*again, desk.ask(ranks[2].again()))):
        assert_right(outcome, place, ranks)


def test_if_all_ranks_cannot_take_part_all_know_it(desk: Desk) -> None:
    desk.compute()
    for rank in ranks_of(3):
        desk.abort(rank, "")
    run_in_full(desk, ranks_of(3))


def test_a_late_abort_belongs_to_the_attempt_that_was_aborted_and_not_to_the_next_one(desk: Desk) -> None:
    """Ranks 0 and 2 cannot take part with their first batch; all skip it."""
    desk.compute()
    ranks = ranks_of(3)
    desk.abort(ranks[0], "no label")
    assert ended(desk.ask(ranks[1]))[0].code is ABORTED
    again = [rank.again() for rank in ranks]
    waiting = [desk.ask(rank) for rank in again[:2]]
    assert desk.waits_for(2)
    assert desk.abort(ranks[2], "no label, too").code is OK
    assert desk.joints.waiting_ranks == 2
    for place, outcome in enumerate(ended(*waiting, desk.ask(again[2]))):
        assert_right(outcome, place, ranks)
    waiting = [desk.ask(replace(rank, call=b"third")) for rank in ranks[:2]]
    assert desk.waits_for(2)
    desk.abort(ranks[2], "of the third attempt")
    assert {outcome.text for outcome in ended(*waiting)} == {"rank 2: of the third attempt"}


def test_a_rank_that_lost_the_answer_that_a_step_was_aborted_gets_it_again(desk: Desk) -> None:
    ranks = ranks_of(3)
    waiting = desk.ask(ranks[0])
    assert desk.waits_for(1)
    desk.abort(ranks[1], "reason")
    texts = {outcome.text for outcome in ended(waiting, *map(desk.ask, (ranks[0], ranks[2], ranks[2])))}
    assert texts == {"rank 1: reason"}


def test_calls_without_a_name_are_told_once(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(2, call=b"")
    desk.abort(ranks[1], "reason")
    assert ended(desk.ask(ranks[0]))[0].code is ABORTED
    run_in_full(desk, ranks)


def test_that_a_step_was_aborted_is_forgotten_after_a_while(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aborted, "ABORTED_SECONDS", 0.0)
    desk.compute()
    desk.abort(Rank(rank=1), "reason")
    assert len(desk.joints._aborted) == 1
    desk.joints.check()
    assert len(desk.joints._aborted) == 0
    run_in_full(desk, ranks_of(2))


def test_a_restarted_training_is_not_told_what_happened_before(desk: Desk) -> None:
    desk.compute()
    old, new = ranks_of(3, process=b"old"), ranks_of(3, process=b"new")
    desk.abort(old[1], "reason")
    assert ended(desk.ask(old[0]))[0].code is ABORTED
    first = desk.ask(new[0])  # One that had come before: of others the server cannot know that they are new.
    assert desk.waits_for(1)
    for place, outcome in enumerate(ended(first, *map(desk.ask, new[1:]))):
        assert_right(outcome, place, new)


def test_steps_that_are_remembered_as_aborted_are_bounded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aborted, "MAX_ABORTED", 3)
    for step in range(5):
        desk.abort(Rank(rank=1, step=step), "reason")
    assert len(desk.joints._aborted) == 3


def unchecked(desk: Desk, rank: Rank, change: Callable[[pb.RequestHeader], object], cut: int = 0) -> Outcome:
    """The call of another client, which checks nothing; of its labels, so many bytes are not sent."""
    logits, labels = rank.payload
    message = framing.UnaryRequest(rank.request.to_proto(), logits, labels[cut:])
    change(message.header)
    caller = DeskCarrier()
    with pytest.raises(Ended):
        desk.service.compute(message, cast("Any", caller))
    return Outcome(caller.code, caller.text)


def test_a_header_or_payload_that_the_server_refuses_ends_the_step(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(3)
    for step, (change, cut, text) in enumerate(
        (
            (lambda header: header.labels.shape.append(2), 0, "labels: got shape (1, 6, 2)"),
            (lambda header: None, 1, "labels: got 5 bytes; expected 6"),
        )
    ):
        here = [replace(rank, step=step) for rank in ranks]
        waiting = desk.ask(here[0])
        assert desk.waits_for(1)
        refused = unchecked(desk, here[1], change, cut)
        assert refused.code is INVALID_ARGUMENT
        assert refused.text.startswith(text)
        for outcome in ended(waiting, desk.ask(here[2])):
            assert (outcome.code, outcome.text) == (ABORTED, f"rank 1: {refused.text}")
        run_in_full(desk, [rank.again() for rank in here])


def test_a_header_that_names_no_place_ends_no_step(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(2)
    first = desk.ask(ranks[0])
    assert desk.waits_for(1)

    def at(rank: int) -> Callable[[pb.RequestHeader], None]:
        def change(header: pb.RequestHeader) -> None:
            header.joint.rank = rank
            header.labels.shape.append(2)

        return change

    texts = [unchecked(desk, ranks[1], at(rank)).text for rank in (9, 0)]
    for place, outcome in enumerate(ended(first, desk.ask(ranks[1]))):
        assert_right(outcome, place, ranks)
    assert all(text.startswith("labels: got shape (1, 6, 2)") for text in texts), "checked before the place"


@pytest.mark.parametrize("other", [{"rank": 0}, {"rank": 2, "world_size": 3}], ids=["a rank that is there", "size"])
def test_who_does_not_belong_to_a_step_does_not_end_it(desk: Desk, other: dict[str, Any]) -> None:
    desk.compute()
    ranks = ranks_of(2)
    first = desk.ask(ranks[0])
    assert desk.waits_for(1)
    assert desk.abort(replace(Rank(), **other), "reason").code is FAILED_PRECONDITION
    for place, outcome in enumerate(ended(first, desk.ask(ranks[1]))):
        assert_right(outcome, place, ranks)


# --- Ranks that have left -----------------------------------------------------------------------------------------


def left_out(outcome: Outcome, rank: Rank, present: list[Rank]) -> None:
    """The outcome is that of a step of these ranks alone."""
    loss, grads = alone(tuple(replace(one, call=b"", run="", world_size=2, round=0) for one in present))
    assert outcome.code is OK, outcome.text
    assert outcome.header.loss == loss
    assert outcome.header.ranks == len(present)
    assert (outcome.gradient == grads[present.index(rank)]).all()


def test_the_others_go_on_without_a_rank_that_has_left(desk: Desk) -> None:
    desk.compute()
    run_in_full(desk, ranks_of(3))
    waiting = [desk.ask(rank) for rank in ranks_of(3, step=1) if rank.rank != 1]
    assert desk.waits_for(2)
    assert desk.admission.requests_in_flight == 3
    assert desk.leave(Rank(rank=1, world_size=3, step=1)).code is OK
    for step in (1, 2):
        present = [rank for rank in ranks_of(3, step=step) if rank.rank != 1]
        for rank, outcome in zip(present, ended(*(waiting or map(desk.ask, present))), strict=True):
            left_out(outcome, rank, present)
        waiting = []
    assert desk.admission.requests_in_flight == 0


def test_a_rank_that_has_left_is_not_missing(desk: Desk) -> None:
    desk.leave(Rank(rank=1, world_size=4))
    first = desk.ask(Rank(rank=0, world_size=4))
    assert desk.waits_for(1)
    (step,) = desk.joints.waiting_steps()
    assert (step.missing, step.missing_ranks, step.first_missing_rank) == ("2, 3", 2, 2)
    assert desk.admission.requests_in_flight == 3
    desk.leave(Rank(rank=3, world_size=4))
    (step,) = desk.joints.waiting_steps()
    assert step.missing == "2"
    desk.compute()
    desk.leave(Rank(rank=2, world_size=4))
    left_out(ended(first)[0], Rank(rank=0, world_size=4), [Rank(rank=0, world_size=4)])


def test_steps_before_the_one_from_which_a_rank_has_left_wait_for_it() -> None:
    """As where an answer was lost: without the rank, the step would have another loss than the first time."""
    desk = Desk(timeout=0.2)
    desk.leave(Rank(rank=1, step=5), evaluation_step=3)
    for options in ({"step": 4}, {"step": 2, "want_grad": False}):
        (outcome,) = ended(desk.ask(Rank(rank=0, **options)))
        assert outcome.code is ABORTED
        assert outcome.text.startswith("rank 1 of 2 did not arrive")
    desk.compute()
    for options in ({"step": 5}, {"step": 3, "want_grad": False}):
        assert ended(desk.ask(Rank(rank=0, **options)))[0].code is OK
    desk.close()


def test_an_answer_can_be_had_again_after_another_rank_has_left(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(2)
    first, _ = ended(*map(desk.ask, ranks))
    assert desk.joints.kept == 2
    desk.leave(Rank(rank=1, step=1))
    assert desk.joints.kept == 1
    assert ended(desk.ask(ranks[0]))[0].grad == first.grad


def test_the_last_rank_that_leaves_ends_the_round_and_the_next_one_has_all_ranks(desk: Desk) -> None:
    desk.compute()
    for number in range(3):
        ranks = ranks_of(2, round=number, process=b"p")
        early = desk.leave(replace(ranks[1], step=1))
        assert early.code is OK
        waiting = desk.ask(replace(ranks[1], round=number + 1))  # It is ahead: it waits for the next round.
        assert desk.waits_for(1)
        (alone_here,) = ended(desk.ask(replace(ranks[0], step=1)))
        left_out(alone_here, replace(ranks[0], step=1), [replace(ranks[0], step=1)])
        desk.leave(replace(ranks[0], step=2))
        assert len(desk.joints._attendance) <= 1
        for place, outcome in enumerate(ended(desk.ask(replace(ranks[0], round=number + 1)), waiting)):
            assert_right(outcome, place, ranks)
    for rank in ranks_of(2, round=3):
        desk.leave(rank)
    (known,) = desk.joints._attendance._runs.values()
    assert (known.left, len(known.over)) == ({}, 1), "of the rounds that have ended, the last one is remembered"


@pytest.mark.parametrize("process", [b"new", b""], ids=["another process", "not said"])
def test_a_leave_that_comes_again_after_its_round_has_ended_changes_nothing(desk: Desk, process: bytes) -> None:
    """Its answer was lost. The training then starts again under its old name, and resumes where it was."""
    desk.compute()
    old, new = ranks_of(3, step=3, process=process and b"old"), ranks_of(3, step=3, process=process)
    run_in_full(desk, [replace(rank, step=2) for rank in old])
    for rank in (*old, old[1]):
        assert desk.leave(rank).code is OK
    waiting = [desk.ask(rank.again()) for rank in (new[0], new[2])]
    assert desk.waits_for(2)
    if not process:
        desk.leave(old[1])
    assert desk.joints.waiting_ranks == 2
    first, last, second = ended(*waiting, desk.ask(new[1].again()))
    for place, outcome in enumerate((first, second, last)):
        assert_right(outcome, place, new)
    desk.leave(new[1])
    outcomes = ended(*(desk.ask(replace(rank, step=4)) for rank in (new[0], new[2])))
    assert [outcome.header.ranks for outcome in outcomes] == [2, 2], "a rank that has come again leaves again"


def test_a_new_round_does_not_hide_that_ranks_wait_for_each_other(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_step, "GRACE_SECONDS", 0.0)
    desk.compute()
    run_in_full(desk, ranks_of(2, want_grad=False))
    desk.leave(Rank(rank=0), evaluation_step=1)
    waiting = [desk.ask(Rank(rank=0, round=1, step=1, want_grad=False, blocking=True, call=b"early"))]
    assert desk.waits_for(1)
    desk.leave(Rank(rank=1), evaluation_step=1)
    waiting.append(desk.ask(Rank(rank=1, round=1, blocking=True, call=b"late")))
    assert desk.waits_for(2)
    desk.joints.check()
    for outcome in ended(*waiting):
        assert "rank 0 at evaluation step 1 of round 1, rank 1 at step 0 of round 1" in outcome.text
        assert "made no evaluation step" not in outcome.text, "both have, before the round"


@pytest.mark.parametrize("process", [b"p", b""])
def test_a_call_of_a_rank_with_another_world_size_forgets_nobody(desk: Desk, process: bytes) -> None:
    desk.compute()
    ranks = ranks_of(2, process=process)
    run_in_full(desk, ranks)
    desk.leave(replace(ranks[1], step=1))
    assert ended(desk.ask(Rank(rank=0, world_size=1, want_grad=False, process=process)))[0].code is OK
    present = [replace(ranks[0], step=1)]
    left_out(ended(desk.ask(present[0]))[0], present[0], present)
    desk.abort(replace(ranks[1], step=2), "reason")
    assert ended(desk.ask(Rank(rank=0, world_size=1, step=2, process=process)))[0].code is OK
    assert ended(desk.ask(replace(ranks[0], step=2)))[0].text == "rank 1: reason"


def test_a_run_that_starts_again_from_step_0_waits_for_all_ranks(desk: Desk) -> None:
    desk.compute()
    desk.leave(Rank(rank=1, step=0, process=b"old"))
    assert ended(desk.ask(Rank(rank=0, process=b"old")))[0].code is OK
    first = desk.ask(Rank(rank=0, process=b"new", call=b"new"))
    assert desk.waits_for(1)
    for place, outcome in enumerate(ended(first, desk.ask(Rank(rank=1, process=b"new")))):
        assert_right(outcome, place, ranks_of(2))


def test_a_rank_that_had_left_and_comes_again_in_the_same_round_is_waited_for(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(3)
    desk.leave(ranks[1])
    first = desk.ask(ranks[0])
    assert desk.waits_for(1)
    assert desk.admission.requests_in_flight == 2
    back = desk.ask(ranks[1])
    assert desk.waits_for(2)
    assert desk.admission.requests_in_flight == 3
    for place, outcome in enumerate(ended(first, back, desk.ask(ranks[2]))):
        assert_right(outcome, place, ranks)


@pytest.mark.parametrize("shape", [(1, CLASSES, 6), NOTHING], ids=["images", "no images"])
def test_a_rank_that_leaves_while_its_own_call_waits_is_not_waited_for_once_that_call_is_gone(
    desk: Desk, shape: tuple[int, ...]
) -> None:
    desk.compute()
    ranks, caller = ranks_of(3, shape=shape), DeskCarrier()
    its_call = desk.ask(ranks[0], caller)
    assert desk.waits_for(1)
    others = [desk.ask(ranks[1])]
    assert desk.waits_for(2)
    desk.leave(ranks[0])
    caller.cancel()
    ended(its_call)
    others.append(desk.ask(ranks[2]))
    assert [outcome.header.ranks for outcome in ended(*others)] == [2, 2]
    third = [replace(rank, step=1) for rank in ranks]
    caller = DeskCarrier()
    its_call, others = desk.ask(third[0], caller), [desk.ask(rank) for rank in third[2:]]
    assert desk.waits_for(2)
    desk.leave(third[0])
    desk.leave(third[1])  # Now only the call of rank 0 is awaited, and it is there.
    assert [outcome.header.ranks for outcome in ended(its_call, *others)] == [2, 2]


def test_the_call_of_a_rank_that_has_left_was_all_that_the_others_waited_for(desk: Desk) -> None:
    desk.compute()
    ranks, caller, go_on = ranks_of(2), DeskCarrier(), threading.Event()
    its_call = desk.ask_in_stream(ranks[0], go_on, caller)
    assert eventually(lambda: desk.joints.waiting_ranks == 1)
    other = desk.ask(ranks[1])
    assert desk.waits_for(1)
    desk.leave(ranks[0])
    caller.gone.set()
    left_out(ended(other)[0], ranks[1], [ranks[1]])
    ended(its_call)


def test_runs_are_forgotten_when_nobody_comes_for_long(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.leave(Rank(rank=1))
    desk.joints.check()
    assert len(desk.joints._attendance) == 1
    monkeypatch.setattr(attendance, "RUN_SECONDS", 0.0)
    desk.joints.check()
    assert len(desk.joints._attendance) == 0


def test_what_is_remembered_of_runs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance, "MAX_ENTRIES", 9)
    runs = Attendance()
    for number in range(50):
        for rank in range(2):
            runs.come(wire.Joint(f"run {number}", 0, rank, 3, process=b"p"), want_grad=False)
        runs.leave(wire.Joint(f"run {number}", 1, 0, 3), 0)
    assert len(runs) == 1
    assert runs.absent(Step(Run("run 49"), 1, want_grad=True), 3) == {0}
    runs.leave(wire.Joint("run 49", 1, 0, 3, round=8), 0)
    runs.leave(wire.Joint("run 49", 1, 0, 3, round=9), 0)
    assert len(runs) == 0, "one run alone can have too many, too"
    for number in range(50):  # Of callers that do not name their process.
        runs.come(wire.Joint(f"run {number}", 0, 0, 3), want_grad=True)
    assert len(runs) <= 9


# --- Ranks that wait at different steps ---------------------------------------------------------------------------


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_step, "GRACE_SECONDS", 0.0)


@pytest.mark.usefixtures("at_once")
def test_ranks_that_wait_for_each_other_at_different_steps_are_told_who_is_where(desk: Desk) -> None:
    calls = [desk.ask(Rank(rank=rank, world_size=3, step=7, blocking=True)) for rank in (0, 2)]
    assert desk.waits_for(2)
    desk.joints.check()
    calls.append(desk.ask(Rank(rank=1, world_size=3, step=6, blocking=True)))
    assert desk.waits_for(3)
    desk.joints.check()
    for outcome in ended(*calls):
        assert outcome.code is ABORTED
        assert outcome.text == (
            "the ranks of run 'run' wait for each other at different steps: ranks 0, 2 at step 7, rank 1 at step 6; "
            "all ranks must make the same calls: one has left out a call, or made one more"
        )
    assert desk.admission.requests_in_flight == 0


@pytest.mark.usefixtures("at_once")
def test_an_evaluation_on_one_rank_is_called_so(desk: Desk) -> None:
    calls = [
        desk.ask(Rank(rank=0, world_size=2, want_grad=False, blocking=True)),
        desk.ask(Rank(rank=1, world_size=2, step=3, blocking=True)),
    ]
    assert desk.waits_for(2)
    steps = {step.step: step for step in desk.joints.waiting_steps()}
    assert (steps[0].evaluation, steps[0].never_evaluated) == (True, "1")
    assert (steps[3].evaluation, steps[3].never_evaluated) == (False, "")
    desk.joints.check()
    for outcome in ended(*calls):
        assert "rank 0 at evaluation step 0, rank 1 at step 3; all ranks must make the same calls" in outcome.text
        assert outcome.text.endswith(
            "; rank 1 made no evaluation step (a call without a gradient) in this run: evaluate on all ranks, or with "
            "a RemoteLoss without joint"
        )


@pytest.mark.parametrize("blocking", [True, False], ids=["at once", "at the timeout"])
@pytest.mark.usefixtures("at_once")
def test_a_call_left_out_before_the_first_evaluation_is_called_so(desk: Desk, blocking: bool) -> None:
    """Rank 1 leaves out step 1 and evaluates; rank 0 has done nothing wrong, and has not evaluated yet."""
    desk.compute()
    run_in_full(desk, ranks_of(2))
    calls = [
        desk.ask(Rank(rank=1, want_grad=False, blocking=blocking)),
        desk.ask(Rank(rank=0, step=1, blocking=blocking)),
    ]
    assert desk.waits_for(2)
    if not blocking:
        evaluation = next(group for group in desk.joints._waiting if not group.step.want_grad)
        evaluation.deadline = 0.0
    desk.joints.check()
    desk.joints.stop()
    outcome = ended(*calls)[0]
    assert "rank 0 at step 1" in outcome.text
    assert outcome.text.endswith(
        "; all ranks must make the same calls: one has left out a call, or made one more, or not all of them evaluate; "
        "rank 0 made no evaluation step (a call without a gradient) in this run: evaluate on all ranks, or with a "
        "RemoteLoss without joint"
    )


def test_an_evaluation_that_others_never_come_to_is_called_so_at_the_timeout() -> None:
    desk = Desk(timeout=0.2)
    (outcome,) = ended(desk.ask(Rank(rank=0, world_size=3, want_grad=False)))
    assert outcome.text.startswith("ranks 1, 2 of 3 did not arrive at evaluation step 0 of run 'run' within 0.2 s")
    assert "; ranks 1, 2 made no evaluation step" in outcome.text
    desk.compute()
    run_in_full(desk, ranks_of(3, want_grad=False))
    (outcome,) = ended(desk.ask(Rank(rank=0, world_size=3, want_grad=False, step=1)))
    assert "; they have stopped, are late, or reached another server" in outcome.text
    desk.close()


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    "calls",
    [
        [Rank(rank=0, step=7), Rank(rank=1, step=6, blocking=True)],
        [Rank(rank=0, step=7, blocking=True), Rank(rank=0, step=6, blocking=True)],
        [Rank(rank=0, step=7, blocking=True), Rank(rank=1, run="other", blocking=True)],
        [Rank(rank=0, world_size=3, step=7, blocking=True), Rank(rank=1, world_size=3, step=6, blocking=True)],
    ],
    ids=["may make another call", "the same rank", "another run", "a rank is on its way"],
)
def test_ranks_that_can_still_meet_wait_on(desk: Desk, calls: list[Rank]) -> None:
    callers = [DeskCarrier() for _ in calls]
    waiting = [desk.ask(rank, caller) for rank, caller in zip(calls, callers, strict=True)]
    assert desk.waits_for(2)
    desk.joints.check()
    assert desk.waits_for(2)
    for caller in callers:
        caller.cancel()
    ended(*waiting)


@pytest.mark.parametrize("process", [b"new", b""], ids=["by its process", "by its patience"])
def test_a_training_that_restarts_while_its_old_calls_still_wait_is_let_be(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, process: bytes
) -> None:
    """Until the server knows that their hosts are gone."""
    monkeypatch.setattr(out_of_step, "GRACE_SECONDS", 0.0 if process else 3600.0)
    desk.compute()
    first = ranks_of(3, step=8, process=b"old")
    run_in_full(desk, first)
    callers = [DeskCarrier(), DeskCarrier()]
    old = [
        desk.ask(Rank(rank=rank, world_size=3, step=9, blocking=True, process=b"old"), caller)
        for rank, caller in enumerate(callers)
    ]
    assert desk.waits_for(2)
    ranks = ranks_of(3, blocking=True, process=process)
    last = desk.ask(ranks[2])
    assert desk.waits_for(3)
    desk.joints.check()
    for place, outcome in enumerate(ended(*map(desk.ask, ranks[:2]), last)):
        assert_right(outcome, place, ranks)
    for caller in callers:
        caller.cancel()
    ended(*old)


@pytest.mark.usefixtures("at_once")
def test_ranks_that_have_left_do_not_hide_that_the_others_wait_for_each_other(desk: Desk) -> None:
    desk.leave(Rank(rank=2, world_size=3))
    calls = [desk.ask(Rank(rank=rank, world_size=3, step=5 + rank, blocking=True)) for rank in range(2)]
    assert desk.waits_for(2)
    desk.joints.check()
    for outcome in ended(*calls):
        assert "rank 0 at step 5, rank 1 at step 6" in outcome.text
