"""Tallies: shown as prometheus_client shows its own metrics, and exact however many threads count."""

from __future__ import annotations

import math
import threading
import time

import pytest
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    enable_created_metrics,
    generate_latest,
)
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from lovasz.server.observe.tallies import Tallies

BOUNDS = (0.001, 0.5, 2, 1e9)
VALUES = (0, 0.001, 0.0011, 0.5, 1, 2, 2.5, 1e9, 1e10, math.inf)
TRACE = {"trace_id": "4bf92f3577b34da6a3ce929d0e0e4736", "span_id": "00f067aa0ba902b7"}


def test_they_are_shown_as_the_metrics_of_prometheus_client_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tallies = Tallies(ours)
    count = tallies.counter("calls", "Calls.", ["method", "code"])
    times = tallies.histogram("seconds", "Their time.", ["phase"], buckets=BOUNDS)
    sizes = tallies.histogram("bytes", "Their size.", buckets=BOUNDS).series()
    their_count = Counter("calls", "Calls.", ["method", "code"], registry=theirs)
    their_times = Histogram("seconds", "Their time.", ["phase"], buckets=BOUNDS, registry=theirs)
    their_sizes = Histogram("bytes", "Their size.", buckets=BOUNDS, registry=theirs)
    for number, value in enumerate(VALUES):
        labels, trace = ("compute", f"code {number % 3}"), TRACE if number % 2 else None
        count.series(*labels).value += number
        times.series("send").add(value, trace)
        sizes.add(value)
        their_count.labels(*labels).inc(number)
        their_times.labels("send").observe(value, trace)
        their_sizes.observe(value)
    assert generate_latest(ours) == generate_latest(theirs)
    assert generate_openmetrics(ours) == generate_openmetrics(theirs)
    for name in ("bytes_sum", "calls_total"):
        assert generate_latest(ours.restricted_registry([name])) == generate_latest(theirs.restricted_registry([name]))


def test_when_they_began_is_hidden_as_that_of_other_metrics_is() -> None:
    registry = CollectorRegistry()
    Tallies(registry).counter("calls", "Calls.").series()
    Tallies(registry).histogram("bytes", "Their size.", buckets=BOUNDS).series()
    assert b"calls_created" in generate_latest(registry)
    disable_created_metrics()
    try:
        assert b"_created" not in generate_latest(registry)
    finally:
        enable_created_metrics()


def test_a_series_is_there_from_its_first_mention_until_it_is_forgotten() -> None:
    registry = CollectorRegistry()
    calls = Tallies(registry).counter("calls", "Calls.", ["caller", "code"])
    for caller in ("alice", "bob"):
        calls.series(caller, "OK")
    assert registry.get_sample_value("calls_total", {"caller": "alice", "code": "OK"}) == 0
    calls.series("alice", "OK").value += 1
    calls.keep(lambda caller, code: caller == "alice")
    assert registry.get_sample_value("calls_total", {"caller": "alice", "code": "OK"}) == 1
    assert registry.get_sample_value("calls_total", {"caller": "bob", "code": "OK"}) is None


def test_nothing_is_lost_while_threads_count_and_somebody_looks() -> None:
    registry = CollectorRegistry()
    tallies = Tallies(registry)
    calls = tallies.counter("calls", "Calls.", ["code"])
    sizes = tallies.histogram("bytes", "Their size.", buckets=BOUNDS).series()
    ended = threading.Event()

    def work(thread: int) -> None:
        for number in range(1000):
            series = calls.series(f"{thread} {number % 50}")
            with tallies.lock:
                series.value += 1
                sizes.add(1)

    def look() -> None:
        while not ended.is_set():
            samples = [sample for family in registry.collect() for sample in family.samples]
            (count, total) = (sample.value for sample in samples if sample.name in ("bytes_count", "bytes_sum"))
            assert count == total

    observer = threading.Thread(target=look)
    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for thread in (observer, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    ended.set()
    observer.join()
    samples = [sample for family in registry.collect() for sample in family.samples if sample.name == "calls_total"]
    assert len(samples) == 8 * 50
    assert {sample.value for sample in samples} == {20}
    assert registry.get_sample_value("bytes_count") == registry.get_sample_value("bytes_sum") == 8000
