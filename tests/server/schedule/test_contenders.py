"""Who has sent a request lately: those that have not are forgotten, whether anybody asks or not."""

from __future__ import annotations

import pytest
from support.clock import Clock

from lovasz.server.schedule import contenders
from lovasz.server.schedule.contenders import CONTENDED_SECONDS, Contenders


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(contenders, "time", clock)
    return clock


def test_those_who_have_sent_nothing_for_a_while_do_not_count(clock: Clock) -> None:
    seen = Contenders[str]()
    assert not seen.are_several
    seen.see("a")
    seen.see("b")
    assert seen.are_several
    clock.now += CONTENDED_SECONDS - 1
    seen.see("a")
    clock.now += 2
    assert not seen.are_several
    assert "a" in seen
    assert "b" not in seen
    assert seen.are_all_in({"a"})


def test_strangers_do_not_pile_up_where_nobody_asks_whether_there_are_several(clock: Clock) -> None:
    seen = Contenders[int]()
    for number in range(10_000):
        clock.now += 0.1
        seen.see(number)
    assert len(seen._seen) <= 10 * CONTENDED_SECONDS + 2
