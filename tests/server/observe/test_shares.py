"""The device's time by caller."""

from __future__ import annotations

from lovasz.server.observe.shares import OTHERS, Shares


def shown(shares: Shares) -> dict[str, float]:
    return {sample.labels["caller"]: sample.value for family in shares.collect() for sample in family.samples}


def test_the_callers_that_were_computed_for_last_are_shown_and_nothing_is_lost() -> None:
    shares = Shares(2)
    for caller in ("token a", "run b", "token a", "host c"):
        shares.add(caller, 1.5)
    assert shown(shares) == {"token a": 3.0, "host c": 1.5, OTHERS: 1.5}
