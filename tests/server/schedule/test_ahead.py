"""Room for requests that have not come: a share for one run and one caller, and never all."""

from __future__ import annotations

import pytest

from lovasz.server.errors import NoBytesLeftError, NoRequestsLeftError, TooLargeError
from lovasz.server.schedule.admission import Admission
from lovasz.server.schedule.joint.ahead import AheadRoom
from lovasz.server.schedule.joint.group import Run


def test_one_run_holds_its_share_at_most() -> None:
    admission = Admission(1000, 8)
    room = AheadRoom(admission, 0.5, 1000)
    with pytest.raises(TooLargeError, match="5 ranks with 5 B are missing"):
        room.reserve(1, 6, Run("run"), "a")
    with pytest.raises(TooLargeError, match=r"hold 0\.5 \(--joint-share\)"):
        room.reserve(300, 3, Run("run"), "a")
    first = room.reserve(10, 4, Run("run"), "a")
    with pytest.raises(NoRequestsLeftError, match="4 missing ranks of run run hold a request; 1 more would"):
        room.reserve(10, 2, Run("run"), "b")
    first.split(10)  # The first rank has come, and two more.
    first.split(10)
    first.split(10)
    assert room.reserve(10, 2, Run("run"), "b") is not None
    assert admission.requests_in_flight == 6


def test_one_caller_holds_a_share_and_all_callers_half_of_the_rest_too() -> None:
    room = AheadRoom(Admission(1000, 100), 0.5, 1000)
    room.reserve(200, 2, Run("one"), "a")
    with pytest.raises(NoBytesLeftError, match="the missing ranks of caller a hold 400 B"):
        room.reserve(200, 2, Run("two"), "a")
    with pytest.raises(NoBytesLeftError, match="the missing ranks of all runs hold 400 B"):
        room.reserve(400, 2, Run("two"), "b")
    assert room.reserve(100, 2, Run("two"), "b") is not None


def test_what_is_given_back_is_forgotten() -> None:
    admission = Admission(1000, 100)
    room = AheadRoom(admission, 0.5, 1000)
    permit = room.reserve(0, 3, Run("run"), "a")
    seat = permit.split(0)
    permit.resize(300)
    with pytest.raises(NoBytesLeftError):
        permit.resize(501)
    permit.absorb(seat)
    permit.release()
    assert not room._bytes
    assert not room._requests
    assert (admission.bytes_in_flight, admission.requests_in_flight) == (0, 0)
