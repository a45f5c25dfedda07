"""Joint steps in queue and engine: computed as one, failed as one, and nothing of them is kept alive."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from dataclasses import replace

import grpc
import numpy as np
import pytest
import torch
from support.desk import (
    ABORTED,
    CANCELLED,
    CLASSES,
    NEVER,
    OK,
    RESOURCE_EXHAUSTED,
    SOFTMAX,
    Caller,
    Desk,
    Rank,
    alone,
    assert_right,
    ended,
    ranks_of,
)
from support.waiting import eventually

from lovasz.core.batch import Request
from lovasz.server.errors import AbandonedError, JointBrokenError, OverloadedError, TooLargeError, fresh
from lovasz.server.schedule.batcher import Batcher, Entry
from lovasz.spec import CrossEntropy, InvalidInput, LovaszHinge, weighted_sum

# --- What the engine makes of a group -----------------------------------------------------------------------------


def test_a_rank_that_cannot_be_computed_with_is_refused_and_named_to_the_others(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(3)
    ranks[1] = replace(ranks[1], label=9)
    first, second, third = ended(*map(desk.ask, ranks))
    assert second.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "labels: got 9 at index [0, 0]" in second.text
    for outcome in (first, third):
        assert outcome.code is ABORTED
        assert outcome.text.startswith("rank 1: labels: got 9 at index [0, 0]")


def test_a_group_that_does_not_fit_on_the_device_is_refused_as_a_whole_and_alone(desk: Desk) -> None:
    desk.engine.memory_elements = 100
    ranks, small = ranks_of(2, shape=(1, CLASSES, 30)), ranks_of(2, run="small")
    calls = [desk.ask(rank) for rank in (*ranks, *small)]
    assert eventually(lambda: len(desk.batcher) == 2)
    desk.compute()
    outcomes = ended(*calls)
    for outcome in outcomes[:2]:
        assert outcome.code is RESOURCE_EXHAUSTED
        assert "the logits of 2 ranks, 180 numbers, do not fit into the free memory of cpu" in outcome.text
    for rank, outcome in enumerate(outcomes[2:]):
        assert_right(outcome, rank, small)


def test_float16_gradients_of_a_group_have_one_scale(desk: Desk) -> None:
    """The ranks' own gradients differ a thousandfold."""
    desk.compute()
    loss = CrossEntropy(class_weights=(1.0, 1.0, 1.0))
    ranks = [
        Rank(rank=rank, dtype="float16", loss=loss, shape=(1, CLASSES, size, size)) for rank, size in enumerate((2, 64))
    ]
    outcomes = ended(*map(desk.ask, ranks))
    assert len({outcome.header.grad_scale for outcome in outcomes}) == 1
    scale = outcomes[0].header.grad_scale
    assert np.log2(scale) == int(np.log2(scale))
    _, grads = alone(tuple(replace(rank, call=b"", run="") for rank in ranks))
    for outcome, grad in zip(outcomes, grads, strict=True):
        assert np.allclose(outcome.gradient.astype(np.float64) / scale, grad, rtol=2**-9, atol=1e-7)


def test_the_hinge_is_joined_too(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(2, loss=LovaszHinge(), shape=(2, 1, 8))
    for rank, outcome in enumerate(ended(*map(desk.ask, ranks))):
        assert_right(outcome, rank, ranks)


def joined_entries(count: int, deadline: float | None = None) -> tuple[Entry, ...]:
    loss = weighted_sum(SOFTMAX)
    entries = tuple(
        Entry(Request.checked(rank.logits, rank.labels, loss), loss, want_grad=True, deadline=deadline)
        for rank in ranks_of(count)
    )
    for entry in entries:
        entry.joined = entries
    return entries


def test_a_member_whose_deadline_has_passed_does_not_keep_its_group_from_being_computed() -> None:
    entries = joined_entries(2, deadline=0.0)
    assert entries[0].claim()
    assert all(entry.future.running() for entry in entries)


def test_a_group_costs_what_all_its_members_do() -> None:
    first, second = joined_entries(2)
    assert first.elements == second.elements == 2 * CLASSES * 6
    queue = Batcher(2 * CLASSES * 6, 100, NEVER)
    queue.put(first)
    queue.put(joined_entries(2)[0])
    assert queue.take(idle=True, timeout_seconds=0) == [first]


def test_members_are_computed_until_the_last_one_leaves() -> None:
    entries, told = joined_entries(3), list[int]()
    for entry in entries[:2]:
        entry.cancel()
        assert not entry.future.cancelled()
    assert entries[0].claim()
    for place, entry in enumerate(entries):
        entry.when_left = lambda place=place: told.append(place)
    entries[2].cancel()
    assert told == [2]
    assert all(entry.left for entry in entries)


def test_a_group_that_is_claimed_while_all_are_leaving_is_computed_or_given_up_as_a_whole() -> None:
    for _ in range(300):
        entries, claimed, start = joined_entries(3), list[bool](), threading.Barrier(4)

        def leave(entry: Entry, start: threading.Barrier = start) -> None:
            start.wait()
            entry.cancel()

        threads = [threading.Thread(target=leave, args=(entry,)) for entry in entries]
        for thread in threads:
            thread.start()
        start.wait()
        claimed.append(entries[0].claim())
        for thread in threads:
            thread.join()
        if claimed[0]:
            assert all(entry.future.running() for entry in entries)
        else:
            assert all(entry.future.done() for entry in entries)


# --- What is left -------------------------------------------------------------------------------------------------


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
def test_no_circle_keeps_the_tensors_of_a_group_alive(desk: Desk) -> None:
    desk.compute()
    ranks = ranks_of(3)
    ended(*map(desk.ask, ranks))
    desk.joints._reclaim()
    assert eventually(lambda: desk.pool.alive == 0), "answered"
    bad = replace(ranks[1], label=9)
    ended(desk.ask(ranks[0]), desk.ask(bad), desk.ask(ranks[2]))
    assert eventually(lambda: desk.pool.alive == 0), "could not be computed with"
    calls = [desk.ask(rank) for rank in ranks[:2]]
    assert desk.waits_for(2)
    desk.joints.stop()
    ended(*calls)
    assert eventually(lambda: desk.pool.alive == 0), "broken"
    desk.engine.memory_elements = 1
    ended(*map(desk.ask, ranks))
    assert eventually(lambda: desk.pool.alive == 0), "did not fit"
    callers = [Caller(), Caller()]
    calls = [desk.ask(rank, caller) for rank, caller in zip(ranks, callers, strict=False)]
    assert desk.waits_for(2)
    for caller in callers:
        caller.cancel()
    ended(*calls)
    assert eventually(lambda: desk.pool.alive == 0), "left"


@pytest.mark.usefixtures("no_collection")
def test_no_circle_keeps_the_tensors_of_a_single_request_alive(desk: Desk) -> None:
    desk.compute()
    for rank in (Rank(world_size=0), Rank(world_size=0, label=9)):
        (outcome,) = ended(desk.ask(rank))
        assert outcome.code is (OK if rank.label is None else grpc.StatusCode.INVALID_ARGUMENT)
        assert eventually(lambda: desk.pool.alive == 0)
    caller, never = Caller(), threading.Event()
    call = desk.ask_in_stream(Rank(world_size=0), never, caller)
    assert eventually(lambda: desk.pool.alive > 0)
    caller.cancel()
    (outcome,) = ended(call)
    assert outcome.code is CANCELLED
    assert eventually(lambda: desk.pool.alive == 0), "left in mid-payload"


@pytest.mark.parametrize(
    "error",
    [
        OverloadedError("full", 1.5),
        JointBrokenError("broken"),
        InvalidInput("labels", "got 9"),
        TooLargeError("large"),
        RuntimeError("a", 2),
        torch.OutOfMemoryError("none left"),
        OSError(5, "failed"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_for_many_is_copied_for_each(error: Exception) -> None:
    copied = fresh(error)
    assert copied is not error
    assert type(copied) is type(error)
    assert str(copied) == str(error)
    assert vars(copied) == vars(error)


def test_each_waiter_raises_an_error_of_its_own() -> None:
    entries, error = joined_entries(2), AbandonedError("gone")
    for entry in entries:
        entry.future.set_exception(error)
    raised = []
    for entry in entries:
        with pytest.raises(AbandonedError, match="gone") as caught:
            entry.wait()
        raised.append(caught.value)
    assert raised[0] is not raised[1]
    assert error.__traceback__ is None
