"""Turns: a tenant with many requests leaves the others their share, and takes what they do not want."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from lovasz.core.batch import Request
from lovasz.server.schedule import contenders
from lovasz.server.schedule.batcher import TURN_ELEMENTS, Batcher
from lovasz.server.schedule.job import Caller, Job, Tenant, cost_of
from lovasz.spec import LovaszSoftmax, weighted_sum

LOSS = weighted_sum(LovaszSoftmax())
GREEDY, POLITE, THIRD = (Tenant("connection", name) for name in ("greedy:1", "polite:2", "third:3"))
SMALL, LARGE = 10, 500
"""Sides: a turn has room for some of the small ones, and for none of the large ones beside another job."""


def job(tenant: Tenant, side: int = LARGE, classes: int = 3) -> Job:
    logits, labels = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.uint8)
    request = Request.checked(logits.expand(1, classes, side, side), labels.expand(1, side, side), LOSS)
    return Job(
        (Caller(request, cost_of(request.layout.elements, LOSS.segments(request.layout)), tenant=tenant),), LOSS, True
    )


def queue() -> Batcher:
    return Batcher(10**9, 1000, 0.0)


def put(batcher: Batcher, *jobs: Job) -> None:
    for one in jobs:
        batcher.put(one)


def take(batcher: Batcher) -> list[Tenant]:
    return [one.tenant for one in batcher.take(idle=True)]


def test_one_tenant_gets_all_in_one_batch() -> None:
    batcher = queue()
    put(batcher, *(job(GREEDY) for _ in range(20)))
    assert take(batcher) == [GREEDY] * 20


@pytest.mark.parametrize("classes", [3, 4], ids=["of one kind", "of two kinds"])
def test_a_tenant_with_one_request_at_a_time_gets_half(classes: int) -> None:
    batcher, served = queue(), Counter[Tenant]()
    put(batcher, job(POLITE, classes=classes), *(job(GREEDY) for _ in range(64)))
    for _ in range(40):
        for one in batcher.take(idle=True):
            served[one.tenant] += one.cost
            put(batcher, job(one.tenant, classes=one.callers[0].request.layout.channels))
    assert abs(served[GREEDY] - served[POLITE]) <= 2 * job(POLITE, classes=4).cost


def test_a_tenant_that_is_away_for_a_moment_waits_for_one_turn_only() -> None:
    batcher = queue()
    put(batcher, job(POLITE), *(job(GREEDY) for _ in range(64)))
    assert take(batcher) == [POLITE, GREEDY]
    assert take(batcher) == [GREEDY]
    put(batcher, job(POLITE))
    assert POLITE in take(batcher)


def test_small_requests_share_a_turn_up_to_its_size() -> None:
    batcher = queue()
    put(batcher, *(job(GREEDY, SMALL) for _ in range(64)), job(POLITE, SMALL), job(THIRD, SMALL))
    assert Counter(take(batcher)) == {GREEDY: 3, POLITE: 1, THIRD: 1}


def test_turns_that_all_have_jobs_in_share_a_batch() -> None:
    batcher = queue()
    put(batcher, *(job(GREEDY, SMALL) for _ in range(64)), *(job(POLITE, SMALL) for _ in range(8)))
    assert Counter(take(batcher)) == {GREEDY: 8, POLITE: 8}
    assert Counter(take(batcher)) == {GREEDY: 3}
    put(batcher, *(job(POLITE, SMALL) for _ in range(8)), *(job(THIRD, SMALL) for _ in range(4)))
    assert Counter(take(batcher)) == {GREEDY: 3, POLITE: 4, THIRD: 4}


def test_a_batch_has_a_limited_number_of_turns() -> None:
    batcher = queue()
    put(batcher, *(job(tenant, SMALL) for tenant in (GREEDY, POLITE) for _ in range(200)))
    took = Counter(take(batcher))
    assert took[GREEDY] == took[POLITE] == -(-16 * TURN_ELEMENTS["cpu"] // batcher._turns._cost(job(GREEDY, SMALL)))


def test_a_tenant_whose_jobs_cannot_share_the_batch_waits_for_one_turn_of_the_others() -> None:
    batcher = queue()
    put(batcher, *(job(GREEDY, SMALL) for _ in range(64)), *(job(POLITE, SMALL, classes=4) for _ in range(8)))
    assert take(batcher) == [GREEDY] * 3
    assert take(batcher) == [POLITE]


def test_jobs_of_two_kinds_cost_a_tenant_no_share() -> None:
    batcher, served = queue(), Counter[Tenant]()
    mixed = itertools.cycle([3] + [4] * 10)
    put(batcher, *(job(POLITE, 200, next(mixed)) for _ in range(12)), *(job(GREEDY, 200) for _ in range(64)))
    for _ in range(200):
        for one in batcher.take(idle=True):
            served[one.tenant] += one.cost
            put(batcher, job(one.tenant, 200, next(mixed) if one.tenant == POLITE else 3))
    assert served[POLITE] / served.total() > 0.45


def test_a_batch_with_little_room_has_whole_turns_after_the_first() -> None:
    """A part of one would be that of the tenant that has waited longest: it got 65 %."""
    batcher, served = Batcher(10**9, 4, 0.0), Counter[Tenant]()
    put(batcher, *(job(GREEDY, SMALL) for _ in range(64)), *(job(POLITE, SMALL) for _ in range(8)))
    for _ in range(200):
        batch = batcher.take(idle=True)
        assert len(batch) <= 4
        for one in batch:
            served[one.tenant] += 1
            put(batcher, job(one.tenant, SMALL))
    assert served[GREEDY] / served.total() < 0.6


def test_what_nobody_else_wants_goes_to_who_wants_it() -> None:
    batcher = queue()
    put(batcher, job(POLITE), *(job(GREEDY) for _ in range(9)))
    taken = [take(batcher) for _ in range(9)]
    assert sum(len(batch) for batch in taken) == 10
    assert len(batcher) == 0


def test_turns_end_some_seconds_after_the_others_have_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = queue()
    put(batcher, job(POLITE), *(job(GREEDY) for _ in range(9)))
    take(batcher)
    monkeypatch.setattr(contenders, "CONTENDED_SECONDS", -1.0)
    assert take(batcher) == [GREEDY] * 8
    assert not batcher._turns._contenders._seen


def test_a_small_request_goes_before_a_large_one_of_its_tenant_also_beside_others() -> None:
    batcher = queue()
    large, small = job(GREEDY), job(GREEDY, 1)
    large.queued = small.queued = 1000.0
    put(batcher, job(POLITE), large, small)
    batch = batcher.take(idle=True)
    assert batch[0] is small


def test_nothing_is_remembered_of_tenants_when_nobody_waits() -> None:
    batcher = queue()
    put(batcher, job(POLITE), *(job(GREEDY) for _ in range(3)))
    while take(batcher):
        pass
    assert not batcher._turns._ends


@pytest.mark.parametrize("side", [LARGE, SMALL])
def test_a_tenant_gets_of_the_device_what_its_weight_says(side: int) -> None:
    weights = {POLITE: 3.0, GREEDY: 1.0, THIRD: 0.5}
    batcher = Batcher(10**9, 1000, 0.0, weight_of=lambda tenant: weights[tenant])
    put(batcher, *(job(tenant, side) for tenant in weights for _ in range(64)))
    served = Counter[Tenant]()
    for _ in range(90):
        for tenant in take(batcher):
            served[tenant] += 1
            put(batcher, job(tenant, side))
    assert served[POLITE] / served[GREEDY] == pytest.approx(3, rel=0.1)
    assert served[THIRD] / served[GREEDY] == pytest.approx(0.5, rel=0.1)
