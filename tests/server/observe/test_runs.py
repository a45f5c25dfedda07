"""What is shown of trainings is bounded, and is what their requests came to."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from support.clock import Clock

from lovasz.server.observe.places import KEPT_SECONDS
from lovasz.server.observe.runs import MAX_CLASSES_SHOWN, SHOWN_SECONDS, Runs


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.monotonic)
    return clock


def shown(runs: Runs) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(runs)
    return registry


def counts(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_training_and_evaluation_of_a_run_are_shown_apart() -> None:
    runs = Runs(3)
    runs.observe("a", True, 0.5, counts(3, 0, 1), counts(4, 0, 4))
    runs.observe("a", False, 0.25, counts(1, 1, 0), counts(1, 2, 0))
    registry = shown(runs)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"lovasz_run_{name}", {"run": "a", **labels})

    assert value("loss", mode="train") == 0.5
    assert value("loss", mode="eval") == 0.25
    assert value("miou", mode="train") == (3 / 4 + 1 / 4) / 2
    assert value("class_iou", mode="train", **{"class": "0"}) == 3 / 4
    assert value("class_iou", mode="train", **{"class": "1"}) is None, "in neither prediction nor labels"
    assert value("class_iou", mode="eval", **{"class": "1"}) == 1 / 2
    assert value("requests_total", mode="train") == 1


def test_iou_is_that_of_the_last_requests() -> None:
    runs = Runs(3)
    for _ in range(200):
        runs.observe("a", True, 1.0, counts(0), counts(10))
    for _ in range(200):
        runs.observe("a", True, 0.1, counts(10), counts(10))
    assert shown(runs).get_sample_value("lovasz_run_miou", {"run": "a", "mode": "train"}) == pytest.approx(1, abs=0.02)


def train_series(runs: Runs, name: str) -> dict[str, float]:
    return {
        sample.labels["run"]: sample.value
        for family in runs.collect()
        for sample in family.samples
        if sample.name == f"lovasz_run_{name}" and sample.labels["mode"] == "train"
    }


def test_with_one_run_too_many_the_others_count_on_and_keep_their_window() -> None:
    most, requests = 20, 10
    runs = Runs(most)
    for request in range(requests):
        for run in range(most + 1):
            runs.observe(str(run), True, 1.0, counts(request % 2), counts(1))
    shown_runs = {str(run) for run in range(most)}
    assert train_series(runs, "requests_total") == dict.fromkeys(shown_runs, requests)
    half = pytest.approx(0.5, abs=0.02)
    assert train_series(runs, "miou") == dict.fromkeys(shown_runs, half), "every second request had an IoU of 1"


def test_a_newcomer_gets_the_place_of_the_run_that_is_silent_longest(clock: Clock) -> None:
    runs = Runs(2)

    def observe(run: str) -> None:
        runs.observe(run, True, 1.0, counts(1), counts(1))

    observe("a")
    clock.now += 1.0
    observe("b")
    clock.now += KEPT_SECONDS - 1.5
    observe("c")
    assert train_series(runs, "requests_total") == {"a": 1, "b": 1}
    clock.now += 0.5
    observe("c")
    assert train_series(runs, "requests_total") == {"b": 1, "c": 1}
    observe("a")
    assert train_series(runs, "requests_total") == {"b": 1, "c": 1}, "b has been silent for less than a minute"


def test_an_evaluation_keeps_the_place_of_its_run(clock: Clock) -> None:
    runs = Runs(1)
    runs.observe("a", True, 1.0, counts(1), counts(1))
    clock.now += KEPT_SECONDS - 1.0
    runs.observe("a", False, 1.0, counts(1), counts(1))
    clock.now += KEPT_SECONDS - 1.0
    runs.observe("b", True, 1.0, counts(1), counts(1))
    assert train_series(runs, "requests_total") == {"a": 1}


def test_a_run_that_has_ended_is_shown_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(3)
    runs.observe("a", True, 1.0, counts(1), counts(1))
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + SHOWN_SECONDS - 1)
    runs.observe("a", False, 2.0, counts(1), counts(1))
    assert shown(runs).get_sample_value("lovasz_run_loss", {"run": "a", "mode": "train"}) == 1
    monkeypatch.setattr(time, "monotonic", lambda: now + SHOWN_SECONDS + 1)
    assert shown(runs).get_sample_value("lovasz_run_loss", {"run": "a", "mode": "train"}) is None
    assert shown(runs).get_sample_value("lovasz_run_loss", {"run": "a", "mode": "eval"}) == 2
    runs.observe("a", True, 3.0, counts(1), counts(1))
    assert shown(runs).get_sample_value("lovasz_run_requests_total", {"run": "a", "mode": "train"}) == 2


def test_many_classes_are_not_shown_one_by_one() -> None:
    runs = Runs(2)
    many = np.ones(MAX_CLASSES_SHOWN + 1, np.int64)
    runs.observe("a", True, 1.0, many, many)
    samples = [sample for family in shown(runs).collect() for sample in family.samples]
    assert len(samples) == 3


def test_a_run_that_changes_its_classes_begins_anew_and_a_void_one_has_no_iou() -> None:
    runs = Runs(2)
    runs.observe("a", True, 1.0, counts(1, 1), counts(2, 2))
    runs.observe("a", True, float("nan"), counts(0), counts(0))
    registry = shown(runs)
    for name in ("loss", "miou"):
        value = registry.get_sample_value(f"lovasz_run_{name}", {"run": "a", "mode": "train"})
        assert value is not None
        assert math.isnan(value)
    assert registry.get_sample_value("lovasz_run_requests_total", {"run": "a", "mode": "train"}) == 1
