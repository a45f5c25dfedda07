"""The device's time by caller."""

from __future__ import annotations

import pytest
from support.clock import Clock

from lovasz.server.observe import places
from lovasz.server.observe.shares import OTHERS, Shares

MOST = 20


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(places, "time", clock)
    return clock


def shown(shares: Shares) -> dict[str, float]:
    return {sample.labels["caller"]: sample.value for family in shares.collect() for sample in family.samples}


def test_callers_without_a_place_count_for_others_and_nothing_is_lost() -> None:
    shares = Shares(2)
    for caller in ("token a", "run b", "token a", "host c", "host d"):
        shares.add(caller, 1.5)
    assert shown(shares) == {"token a": 3.0, "run b": 1.5, OTHERS: 3.0}


def test_with_one_caller_too_many_each_series_only_grows_by_what_was_computed(clock: Clock) -> None:
    shares = Shares(MOST)
    before = shown(shares)
    for _ in range(100):
        for caller in range(MOST + 1):
            shares.add(f"token {caller}", 2.0)
            now = shown(shares)
            label = f"token {caller}" if caller < MOST else OTHERS
            assert now == {**before, label: before.get(label, 0.0) + 2.0}
            before = now
            clock.now += 1.0
    assert before == {**{f"token {caller}": 200.0 for caller in range(MOST)}, OTHERS: 200.0}


def test_a_newcomer_gets_the_place_of_the_caller_that_is_silent_longest(clock: Clock) -> None:
    shares = Shares(2)
    shares.add("token a", 500.0)
    clock.now += 1.0
    shares.add("token b", 700.0)
    clock.now += places.KEPT_SECONDS - 1.5
    shares.add("token c", 1.0)
    assert shown(shares) == {"token a": 500.0, "token b": 700.0, OTHERS: 1.0}
    clock.now += 0.5
    shares.add("token c", 2.0)
    assert shown(shares) == {"token b": 700.0, "token c": 2.0, OTHERS: 1.0}, "the seconds of a were shown as those of a"
    shares.add("token a", 4.0)
    assert shown(shares) == {"token b": 700.0, "token c": 2.0, OTHERS: 5.0}, "b has been silent for less than a minute"


def test_a_caller_keeps_its_place_when_no_other_needs_it(clock: Clock) -> None:
    shares = Shares(1)
    shares.add("token a", 1.0)
    clock.now += 100 * places.KEPT_SECONDS
    shares.add("token a", 2.0)
    shares.add("token b", 4.0)
    assert shown(shares) == {"token a": 3.0, OTHERS: 4.0}
