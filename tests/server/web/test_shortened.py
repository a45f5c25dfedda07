"""What those see who have no token: names of runs are shortened, and stay different."""

from __future__ import annotations

import json
import re

import numpy as np
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from lovasz.server.observe.metrics import Metrics
from lovasz.server.observe.waiting_steps import WaitingStep, WaitingSteps
from lovasz.server.web.shortened import page_for_strangers

RUNS = ("cityscapes-7", "cityscapes-8", "ab", "")
SHORT = re.compile(r"(city|a|)~[0-9a-f]{8}")


def test_names_of_runs_are_shortened_everywhere_and_nothing_else_is_changed() -> None:
    metrics, counts = Metrics(10), np.ones(2, np.int64)
    for run in RUNS[:3]:
        metrics.runs.observe(run, True, 0.5, counts, counts)
    for caller in ("run cityscapes-7", "token alice", "host ipv4:127.0.0.1"):
        metrics.shares.add(caller, 1.0)
    steps = [WaitingStep(run, 3, 1.0, 2, "1", 1, 1) for run in RUNS]
    metrics.registry.register(WaitingSteps(lambda: steps, 10))
    page = page_for_strangers(metrics.registry, lambda: steps, lambda: False)

    text = generate_latest(page.registry).decode()
    assert not any(run in text for run in RUNS[:2])
    labels = {
        family.name: [sample.labels for sample in family.samples] for family in text_string_to_metric_families(text)
    }
    shown = {sample["run"] for sample in labels["lovasz_run_loss"]}
    assert len(shown) == 3
    assert all(map(SHORT.fullmatch, shown))
    callers = {sample["caller"] for sample in labels["lovasz_caller_device_seconds"]}
    assert {"token alice", "host ipv4:127.0.0.1", "others"} < callers
    assert {caller.removeprefix("run ") for caller in callers if caller.startswith("run ")} < shown
    waiting = json.loads(page.numbers())["joint_steps"]
    assert len({step["run"] for step in waiting}) == len(RUNS)
    assert {step["run"] for step in waiting} > shown
    assert {(step["step"], step["missing"]) for step in waiting} == {(3, "1")}

    full = generate_latest(metrics.registry).decode()
    assert [line.split("{")[0].split(" ")[0] for line in full.splitlines()] == [
        line.split("{")[0].split(" ")[0] for line in text.splitlines()
    ]
