"""A job with many calls in flight leaves a trainer that makes one at a time its share."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from support.audit import Audit
from support.messages import LOSS, tensors
from support.scrape import metric

from lovasz.client import LossClient
from lovasz.server.launch import ServerProcess

IN_FLIGHT = 16
POLITE_CALLS = 20
MOST = 10
"""Times as many calls of the other as of the polite one. Without turns, it is 16."""


def test_a_caller_with_many_calls_in_flight_takes_turns_with_one_that_makes_one_at_a_time(
    besieged: ServerProcess, audit: Audit
) -> None:
    done, end = [0] * IN_FLIGHT, threading.Event()
    logits, labels = tensors(96, classes=19)

    def flood(client: LossClient, number: int) -> None:
        while not end.is_set():
            client.compute(logits, labels, LOSS)
            done[number] += 1

    with (
        LossClient(besieged.target, timeout=60) as greedy,
        LossClient(besieged.target, timeout=60) as polite,
        ThreadPoolExecutor(IN_FLIGHT) as threads,
    ):
        calls = [threads.submit(flood, greedy, number) for number in range(IN_FLIGHT)]
        try:
            while not all(done):
                threading.Event().wait(0.01)
            before = sum(done)
            for _ in range(POLITE_CALLS):
                polite.compute(logits, labels, LOSS)
            during = sum(done) - before
        finally:
            end.set()
        for call in calls:
            call.result(60)
    assert during < MOST * POLITE_CALLS
    assert metric(besieged, "lovasz_caller_device_seconds_total", caller="host ipv4:127.0.0.1") > 0
