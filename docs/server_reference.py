"""The pages metrics.md and configuration.md, from the code that they describe."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from prometheus_client import Metric

from lovasz.server.config import settings
from lovasz.server.observe.metrics import GAUGES, Metrics
from lovasz.server.observe.waiting_steps import WaitingStep, WaitingSteps
from lovasz.server.settings import format_bytes, variable_of

SUFFIX = {"counter": "_total", "info": "_info"}


def metrics_page() -> str:
    metrics = Metrics()
    metrics.watch(dict.fromkeys(GAUGES, float))
    metrics.describe(version="", device="", hardware="", backend="")
    metrics.registry.register(WaitingSteps(lambda: [WaitingStep("", 0, 0.0, 1, "", 1, 0)], 1))
    # Where a metric begins with its first event, this is it: labels are read from samples.
    metrics.requests.series("", "", "")
    metrics.count_caller("", "")
    metrics.runs.observe("", want_grad=True, loss=0.0, intersection=np.ones(1, np.int64), union=np.ones(1, np.int64))
    rows = sorted(map(_metric_row, metrics.registry.collect()))
    return f"""# Metrics

`GET /metrics` on the port of `--metrics-listen` serves these metrics, in the formats of Prometheus and OpenMetrics.
Each label has a bounded number of values at a time. Histograms have `_bucket`, `_sum` and `_count`; times are in
seconds, sizes in bytes. [operations.md](operations.md) says what to watch, and what to do about an alert. The same port
has a page for people at `/`, and the numbers of that page at `/status`. `make docs` writes this page from
[`metrics.py`](../server/lovasz/server/observe/metrics.py).

The phases of a request: `receive`: header and payload; `joint`: waiting for the other ranks of its step; `queue`:
waiting for the device; `compute`: computing its batch; `copy`: copying the batch's gradients to the host; `send`:
sending the answer. An answer in one message counts as sent when gRPC has taken it: what the network takes for it is not
measured. Other labels: `mode` is `train` (with a gradient) or `eval`; `over` is the lower limit of a class of times, in
seconds; `lovasz_abandoned_total` has the reasons `cancelled` and `expired`. The reasons of `lovasz_rejections_total`
beside those that its text names: `starting` and `stopping` (the server), `invalid`, `mismatch` and `conflict` (a rank
that does not fit its joint step, or comes twice), `unauthenticated`.

| metric | type | labels | description |
|---|---|---|---|
{"".join(rows)}"""


def _metric_row(metric: Metric) -> str:
    labels = dict.fromkeys(name for sample in metric.samples for name in sample.labels if name != "le")
    name = metric.name + SUFFIX.get(metric.type, "")
    return f"| `{name}` | {metric.type} | {', '.join(f'`{label}`' for label in labels)} | {metric.documentation} |\n"


def configuration_page() -> str:
    return f"""# Configuration

Each setting is an option of `lovasz-server` and an environment variable; if both are set, the option is used. An
invalid value stops the server at its start with a message that names it. Unknown variables that begin with `LOVASZ_`
are logged. `make docs` writes this page from [`config.py`](../server/lovasz/server/config.py).

| option | variable | default | description |
|---|---|---|---|
{"".join(_setting_rows())}"""


def _setting_rows() -> Iterator[str]:
    for field in settings():
        flag, default = field.metadata["flag"], field.default
        if isinstance(default, bool):
            default = "on" if default else "off"
        elif field.name.endswith("_bytes"):
            default = format_bytes(int(str(default)))
        elif default == "":
            default = "none"
        text = field.metadata["help"].replace("|", "\\|")
        yield f"| `{flag} {field.metadata['metavar']}` | `{variable_of(flag)}` | `{default}` | {text} |\n".replace(
            "on|off", "on\\|off"
        )
