"""Writes metrics.md and configuration.md from the code that they describe, so that neither can fall behind.

python docs/reference.py            # make docs
python docs/reference.py --check    # fails if a page is not as it would be written
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from prometheus_client import Metric

from lovasz.server.config import ServerConfig, format_bytes, variable_of
from lovasz.server.observe.metrics import GAUGES, Metrics
from lovasz.server.observe.waiting_steps import WaitingSteps

FOLDER = Path(__file__).parent
SUFFIX = {"counter": "_total", "info": "_info"}


def metrics_page() -> str:
    metrics = Metrics()
    metrics.watch(dict.fromkeys(GAUGES, float))
    metrics.describe(version="", device="", hardware="")
    metrics.registry.register(WaitingSteps(list, 1))
    rows = sorted(map(_metric_row, metrics.registry.collect()))
    return f"""# Metrics

What `GET /metrics` on the port of `--metrics-listen` serves, in the formats of Prometheus and OpenMetrics. Written
from [`metrics.py`](../server/lovasz/server/observe/metrics.py) by `make docs`. A server shows a bounded number of
values of each label at a time. Histograms have `_bucket`, `_sum` and `_count`; times are in seconds, sizes in bytes.
What to watch, and what an alert asks for: [operations.md](operations.md). The same port has a page for people at `/`,
and its numbers at `/status`.

The phases of a request: `receive`: header and payload; `joint`: waiting for the other ranks of its step; `queue`:
waiting for the device; `compute`: its batch; `copy`: of the batch's gradients to the host; `send`: its answer.

| metric | type | labels | what |
|---|---|---|---|
{"".join(rows)}"""


def _metric_row(metric: Metric) -> str:
    labels = sorted({name for sample in metric.samples for name in sample.labels} - {"le"})
    if metric.name == "lovasz_requests":
        labels = ["code", "loss", "method"]  # Without samples until the first request.
    if metric.name.startswith("lovasz_joint_step_"):
        labels = ["run"]
    if metric.name.startswith("lovasz_run_"):
        labels = ["run", "mode", *["class"][: metric.name == "lovasz_run_class_iou"]]
    name = metric.name + SUFFIX.get(metric.type, "")
    return f"| `{name}` | {metric.type} | {', '.join(f'`{label}`' for label in labels)} | {metric.documentation} |\n"


def configuration_page() -> str:
    return f"""# Configuration

Each setting of a server is an option of `lovasz-server` or a variable; the option wins. An invalid value ends the
start with a message that names it; variables that begin with `LOVASZ_` and set nothing are logged. Written from
[`config.py`](../server/lovasz/server/config.py) by `make docs`.

| option | variable | default | what |
|---|---|---|---|
{"".join(_setting_rows())}"""


def _setting_rows() -> Iterator[str]:
    for field in fields(ServerConfig):
        flag, default = field.metadata["flag"], field.default
        if isinstance(default, bool):
            default = "on" if default else "off"
        elif field.name.endswith("_bytes"):
            default = format_bytes(int(str(default)))
        text = field.metadata["help"].replace("|", "\\|")
        yield f"| `{flag} {field.metadata['metavar']}` | `{variable_of(flag)}` | `{default}` | {text} |\n".replace(
            "on|off", "on\\|off"
        )


PAGES = {"metrics.md": metrics_page, "configuration.md": configuration_page}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is not up to date")
    check = parser.parse_args().check
    stale = []
    for name, written in PAGES.items():
        page = FOLDER / name
        if check and (not page.exists() or page.read_text() != written()):
            stale.append(name)
        elif not check:
            page.write_text(written())
    if stale:
        print(f"not up to date: {', '.join(stale)}; run make docs", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
