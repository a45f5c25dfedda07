"""Joint steps in queue and engine: computed as one, failed as one, and nothing of them is kept alive."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from dataclasses import replace

import grpc
import numpy as np
import pytest
from support.desk import (
    ABORTED,
    CANCELLED,
    CLASSES,
    OK,
    RESOURCE_EXHAUSTED,
    Desk,
    DeskCarrier,
    Rank,
    alone,
    assert_right,
    ended,
    ranks_of,
)
from support.waiting import eventually

from lovasz.spec import CrossEntropy, LovaszHinge

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
    desk.joints._reclaim(None)
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
    callers = [DeskCarrier(), DeskCarrier()]
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
    caller, never = DeskCarrier(), threading.Event()
    call = desk.ask_in_stream(Rank(world_size=0), never, caller)
    assert eventually(lambda: desk.pool.alive > 0)
    caller.cancel()
    (outcome,) = ended(call)
    assert outcome.code is CANCELLED
    assert eventually(lambda: desk.pool.alive == 0), "left in mid-payload"
