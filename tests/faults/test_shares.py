"""A job with many calls in flight leaves a trainer that makes one at a time its share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from support.audit import Audit
from support.messages import LOSS, tensors
from support.scrape import metric

from lovasz.client import Joint, LossClient
from lovasz.server.launch import ServerProcess

POLITE_CALLS = 20
RANKS = 12


@contextmanager
def flood(server: ServerProcess, in_flight: int, side: int, classes: int) -> Iterator[list[int]]:
    """A client that always has so many calls in flight: how many were answered, of each of its threads."""
    done, end = [0] * in_flight, threading.Event()
    logits, labels = tensors(side, classes=classes)

    def call(client: LossClient, number: int) -> None:
        while not end.is_set():
            client.compute(logits, labels, LOSS)
            done[number] += 1

    with LossClient(server.target, timeout=60) as greedy, ThreadPoolExecutor(in_flight) as threads:
        calls = [threads.submit(call, greedy, number) for number in range(in_flight)]
        try:
            while not all(done):
                threading.Event().wait(0.01)
            yield done
        finally:
            end.set()
        for one in calls:
            one.result(60)


@pytest.mark.parametrize(
    ("in_flight", "side", "classes", "most"),
    [
        pytest.param(16, 96, 19, 10, id="device"),  # Without turns on the device, 16 times as many.
        pytest.param(28, 32, 3, 8, id="interpreter"),  # Without lanes, 20 times as many.
    ],
)
def test_a_caller_with_many_calls_in_flight_takes_turns_with_one_that_makes_one_at_a_time(
    besieged: ServerProcess, audit: Audit, in_flight: int, side: int, classes: int, most: int
) -> None:
    logits, labels = tensors(side, classes=classes)
    with LossClient(besieged.target, timeout=60) as polite, flood(besieged, in_flight, side, classes) as done:
        polite.compute(logits, labels, LOSS)
        before = sum(done)
        for _ in range(POLITE_CALLS):
            polite.compute(logits, labels, LOSS)
        during = sum(done) - before
    assert during < most * POLITE_CALLS
    assert metric(besieged, "lovasz_caller_device_seconds_total", caller="host ipv4:127.0.0.1") > 0


def test_ranks_of_one_connection_meet_beside_a_flood() -> None:
    """Only one call of a connection is worked on at a time then, and each rank waits for all others."""
    logits, labels = tensors(16)

    def rank(client: LossClient, number: int) -> float:
        return client.compute(logits, labels, LOSS, joint=Joint("beside", number, RANKS, step=0)).loss

    with (
        ServerProcess(["--device", "cpu"]) as server,  # Its own: answers to ranks are kept for a while.
        flood(server, 8, 16, 4),
        LossClient(server.target, timeout=60) as client,
        ThreadPoolExecutor(RANKS) as threads,
    ):
        client.compute(logits, labels, LOSS)
        losses = set(threads.map(rank, [client] * RANKS, range(RANKS)))
    assert len(losses) == 1
