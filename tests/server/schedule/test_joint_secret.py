"""Runs with a secret: who does not know it meets none of its ranks, and two trainings of one name are told."""

from __future__ import annotations

from dataclasses import replace

import grpc
import pytest
from support.desk import OK, Desk, DeskCarrier, Rank, assert_right, ended, ranks_of

from lovasz.server.schedule.joint import attendance
from lovasz.server.schedule.joint.attendance import Attendance
from lovasz.server.schedule.joint.group import Run

SECRET, OTHER = b"0123456789abcdef", b"fedcba9876543210"
REFUSED = grpc.StatusCode.FAILED_PRECONDITION


def at(address: str) -> DeskCarrier:
    return DeskCarrier(address=f"ipv4:{address}:1234")


@pytest.mark.parametrize("secret", [b"", OTHER])
def test_a_stranger_that_comes_first_changes_nothing(desk: Desk, secret: bytes) -> None:
    honest = ranks_of(2, secret=SECRET)
    wrong = [
        Rank(rank=1, call=b"first", secret=secret),
        Rank(rank=0, world_size=3, call=b"size", step=1, secret=secret),
        Rank(rank=1, shape=(1, 4, 9000, 9), call=b"huge", step=2, secret=secret),
    ]
    strangers = [desk.ask(rank) for rank in wrong]
    desk.abort(Rank(rank=1, call=b"abort", secret=secret), "no")
    desk.leave(Rank(rank=1, call=b"leave", secret=secret))
    desk.compute()
    for step in range(3):
        ranks = [replace(rank, step=step) for rank in honest]
        for number, outcome in enumerate(ended(*map(desk.ask, ranks))):
            assert_right(outcome, number, ranks)
    desk.joints.stop()
    assert OK not in {outcome.code for outcome in ended(*strangers)}


def test_who_has_no_secret_is_refused_alone_and_told_where_the_others_are(desk: Desk) -> None:
    waits = desk.ask(Rank(rank=0, secret=SECRET), at("10.0.0.7"))
    assert desk.waits_for(1)
    (refused,) = ended(desk.ask(Rank(rank=1, call=b"stranger"), at("10.0.0.8")))
    assert refused.code is REFUSED
    assert "belongs to a training with a secret or a token at ipv4:10.0.0.7:1234" in refused.text
    for said in (desk.abort(Rank(rank=1), "no"), desk.leave(Rank(rank=1))):
        assert said.code is REFUSED
    assert desk.waits_for(1)
    desk.compute()
    (second,) = ended(desk.ask(Rank(rank=1, secret=SECRET)))
    assert_right(second, 1, ranks_of(2))
    (first,) = ended(waits)
    assert_right(first, 0, ranks_of(2))


def test_who_waits_without_a_secret_is_told_when_the_others_come(desk: Desk) -> None:
    stranger = desk.ask(Rank(rank=1))
    assert desk.waits_for(1)
    honest = desk.ask(Rank(rank=0, secret=SECRET))
    (refused,) = ended(stranger)
    assert (refused.code, "join it with that secret" in refused.text) == (REFUSED, True)
    desk.joints.stop()
    ended(honest)


def test_two_trainings_with_secrets_are_right_and_both_are_warned(desk: Desk) -> None:
    desk.compute()
    trainings = {"10.0.0.7": ranks_of(2, secret=SECRET), "10.0.0.8": ranks_of(2, secret=OTHER, shape=(1, 4, 9))}
    warnings: dict[str, str] = {}
    for _ in range(2):
        for host, ranks in trainings.items():
            for number, outcome in enumerate(ended(*(desk.ask(rank, at(host)) for rank in ranks))):
                assert_right(outcome, number, ranks)
                assert outcome.header is not None
                warnings[host] = outcome.header.warning
            trainings[host] = [replace(rank, step=rank.step + 1) for rank in ranks]
    assert "another training at ipv4:10.0.0.8:1234 has a run of the name 'run'" in warnings["10.0.0.7"]
    assert "another training at ipv4:10.0.0.7:1234 has a run of the name 'run'" in warnings["10.0.0.8"]


def test_a_training_that_was_restarted_with_another_secret_is_not_warned(desk: Desk) -> None:
    desk.compute()
    for secret in (SECRET, OTHER):
        for outcome in ended(*map(desk.ask, ranks_of(2, secret=secret))):
            assert outcome.header is not None
            assert not outcome.header.warning


def test_two_trainings_without_secrets_that_take_turns_are_both_told() -> None:
    runs, told = Attendance(), []
    for step in range(4):
        for process, address in ((b"a", "here"), (b"b", "there")):
            try:
                runs.come(replace(Rank(step=step, process=process).place()), True, address)
            except attendance.RunConflictError as error:
                told.append((address, str(error)))
    assert {address for address, _ in told} == {"here", "there"}
    assert all("at here" in text and "at there" in text and "'run'" in text for _, text in told)


def test_a_late_call_of_a_process_that_was_restarted_is_no_conflict() -> None:
    runs = Attendance()
    for process in (b"a", b"b", b"a", b"c", b"d"):
        runs.come(Rank(process=process).place(), want_grad=True)


def test_conflicts_end_some_seconds_after_the_other_training(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Attendance()
    runs.come(Rank(secret=SECRET).place(), want_grad=True)
    assert runs.conflict(Run("run"))
    monkeypatch.setattr(attendance, "LIVE_SECONDS", 0.0)
    assert not runs.conflict(Run("run"))
    runs.come(Rank().place(), want_grad=True)


def test_who_has_no_secret_is_refused_for_as_long_as_the_others_wait(desk: Desk) -> None:
    waits = desk.ask(Rank(rank=0, secret=SECRET))
    assert desk.waits_for(1)
    (known,) = desk.joints._attendance._runs.values()
    known.used -= 2 * attendance.LIVE_SECONDS
    desk.joints.check()
    (refused,) = ended(desk.ask(Rank(rank=1, call=b"stranger")))
    assert refused.code is REFUSED
    desk.compute()
    for number, outcome in enumerate(ended(waits, desk.ask(Rank(rank=1, secret=SECRET)))):
        assert_right(outcome, number, ranks_of(2))


def test_a_secret_is_in_no_text(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    rank = Rank(secret=SECRET, process=b"p")
    assert "secret" not in repr(rank.place())
    assert SECRET.decode() not in repr(rank.request)
    desk.abort(rank, "no")
    assert SECRET.decode() not in caplog.text
    kept = [*desk.joints._attendance._runs, *desk.joints._aborted._steps]
    assert SECRET.decode() not in repr(kept), "the server holds no secret, only what stands for it"
