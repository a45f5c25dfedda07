"""Calls that wait for their header: how many, how long, and who makes room."""

from __future__ import annotations

from typing import Any, cast

import pytest
from support.clock import Clock

from lovasz.server.errors import AbandonedError, NoRequestsLeftError, StalledError
from lovasz.server.observe.metrics import Metrics
from lovasz.server.transport import timed_calls
from lovasz.server.transport.timed_calls import Limit, TimedCalls


class Context:
    """The connection of a call."""

    def __init__(self, peer: str = "ipv4:a:1") -> None:
        self._peer = peer
        self.is_cut_off = False

    def peer(self) -> str:
        return self._peer

    def cancel(self) -> None:
        self.is_cut_off = True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timed_calls, "time", clock)
    monkeypatch.setattr(timed_calls, "CONNECTION_CALLS", 2)
    return clock


def calls_of(most: int) -> TimedCalls:
    return TimedCalls("calls", 5.0, most, Metrics())


def opened(calls: TimedCalls, peer: str = "ipv4:a:1") -> Context:
    context = Context(peer)
    calls.open(cast("Any", context))
    return context


def test_a_call_whose_time_is_up_is_cut_off_once(clock: Clock) -> None:
    calls = calls_of(10)
    context = opened(calls)
    clock.now += 5.0
    calls.check()
    assert not context.is_cut_off
    clock.now += 0.1
    calls.check()
    assert context.is_cut_off


def test_a_call_may_have_a_limit_of_its_own(clock: Clock) -> None:
    calls = calls_of(10)
    usual, patient = opened(calls), Context()
    call = calls.open(cast("Any", patient), Limit("message", 8.0, "--payload-timeout"))
    clock.now += 6.0
    calls.check()
    assert (usual.is_cut_off, patient.is_cut_off) == (True, False)
    clock.now += 2.5
    calls.check()
    assert patient.is_cut_off
    with pytest.raises(StalledError, match=r"no message arrived within 8 s \(--payload-timeout\)"):
        call.read(abandoned)


def abandoned() -> None:
    """What a call reads whose end gRPC has seen."""
    raise AbandonedError


def test_who_makes_room_may_try_again_and_is_no_staller(clock: Clock) -> None:
    calls = calls_of(1)
    call = calls.open(cast("Any", Context()))
    with pytest.raises(AbandonedError):
        call.read(abandoned)
    clock.now += 1.0
    opened(calls, "ipv4:a:2")
    with pytest.raises(NoRequestsLeftError, match="too many calls at a time") as raised:
        call.read(abandoned)
    assert raised.value.was_sent


def test_the_oldest_makes_room_but_not_for_a_burst(clock: Clock) -> None:
    calls = calls_of(2)
    first, second = opened(calls, "ipv4:a:1"), opened(calls, "ipv4:a:2")
    with pytest.raises(NoRequestsLeftError):
        opened(calls, "ipv4:a:3")
    clock.now += 1.0
    third = opened(calls, "ipv4:a:3")
    assert (first.is_cut_off, second.is_cut_off, third.is_cut_off) == (True, False, False)


@pytest.mark.parametrize("peer", ["ipv4:a:1", "unix:"])
def test_a_connection_may_have_many_for_a_moment_only(clock: Clock, peer: str) -> None:
    calls = calls_of(100)
    for _ in range(10):
        opened(calls, peer)
    clock.now += 1.0
    opened(calls, "ipv4:b:1")
    if peer == "unix:":
        opened(calls, peer)  # Any number of callers.
        return
    with pytest.raises(NoRequestsLeftError):
        opened(calls, peer)


def test_what_has_ended_does_not_count(clock: Clock) -> None:
    calls = calls_of(2)
    for _ in range(10):
        with calls.open(cast("Any", Context())):
            clock.now += 1.0
    assert not calls._open
    assert not calls._of_connection
