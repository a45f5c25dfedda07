"""Writes the dashboards that Grafana is provisioned with: each panel is a line here, and a page of JSON there.

python deploy/grafana/dashboards.py            # make docs
python deploy/grafana/dashboards.py --check    # fails if a file is not as it would be written
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
WIDTH, HEIGHT = 8, 8
COLUMNS = 24


@dataclass(frozen=True)
class Panel:
    """A plot over time.

    Attributes:
        text: for people who know Prometheus, but not the project.
        unit: one of Grafana's.
        series: pairs of legend and expression.
    """

    title: str
    text: str
    unit: str
    series: tuple[tuple[str, str], ...]
    stacked: bool = False
    least: int = 0


def per_second(metric: str, by: str) -> tuple[tuple[str, str], ...]:
    return ((f"{{{{{by}}}}}", f"sum by ({by}) (rate({metric}[$__rate_interval]))"),)


def quantile(share: float, metric: str, by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({metric}_bucket[$__rate_interval])))"


def quantiles(metric: str, shares: tuple[float, ...] = (0.5, 0.9, 0.99)) -> tuple[tuple[str, str], ...]:
    return tuple((f"p{100 * share:.0f}", quantile(share, metric)) for share in shares)


OPERATIONS = (
    Panel(
        "Requests a second, by outcome",
        "gRPC status codes. INVALID_ARGUMENT is the caller's mistake, RESOURCE_EXHAUSTED want of room, ABORTED a joint "
        "step that was given up or a caller that stalled, INTERNAL a fault of the server.",
        "reqps",
        per_second("lovasz_requests_total", "code"),
    ),
    Panel(
        "Share of requests that failed",
        "All codes but OK; clients try RESOURCE_EXHAUSTED and UNAVAILABLE again by themselves.",
        "percentunit",
        (
            (
                "failed",
                '1 - (sum(rate(lovasz_requests_total{code="OK"}[$__rate_interval])) '
                "/ sum(rate(lovasz_requests_total[$__rate_interval])))",
            ),
        ),
    ),
    Panel(
        "Where a request spends its time",
        "Seconds in each phase for each request that was computed, stacked: receiving the payload, waiting for the "
        "other ranks of a joint step, for the device, computing, sending. The time of failed requests is in it.",
        "s",
        (
            (
                "{{phase}}",
                "sum by (phase) (rate(lovasz_phase_seconds_sum[$__rate_interval])) "
                '/ scalar(sum(rate(lovasz_phase_seconds_count{phase="compute"}[$__rate_interval])))',
            ),
        ),
        stacked=True,
    ),
    Panel(
        "99th percentile of each phase",
        "Which phase slow requests are slow in; also those that failed, in their last phase.",
        "s",
        (("{{phase}}", quantile(0.99, "lovasz_phase_seconds", "phase")),),
    ),
    Panel(
        "Logits computed a second",
        "Of all requests.",
        "short",
        (("logits", "sum(rate(lovasz_elements_total[$__rate_interval]))"),),
    ),
    Panel("Queue", "Requests that wait for the device.", "short", (("requests", "sum(lovasz_queue_requests)"),)),
    Panel(
        "Memory",
        "Tensor bytes of the requests held, and the budget beyond which requests are refused (--memory-budget).",
        "bytes",
        (
            ("held", "sum(lovasz_in_flight_bytes)"),
            ("budget", "sum(lovasz_budget_bytes)"),
            ("kept for the next", "sum(lovasz_staging_idle_bytes)"),
            ("whole process", 'sum(process_resident_memory_bytes{job="lovasz"})'),
        ),
    ),
    Panel(
        "Requests held",
        "And how many may be (--max-requests).",
        "short",
        (("held", "sum(lovasz_in_flight_requests)"), ("at most", "sum(lovasz_max_requests)")),
    ),
    Panel("Requests in a batch", "1: nothing shares the device.", "short", quantiles("lovasz_batch_requests")),
    Panel("Size of requests", "Logits and labels, without the gradient.", "bytes", quantiles("lovasz_request_bytes")),
    Panel(
        "Refused, by reason",
        "overloaded: come again later; too_large: can never fit; invalid: the caller's mistake; mismatch: a rank that "
        "does not fit its joint step; stopping: the server was.",
        "reqps",
        per_second("lovasz_rejections_total", "reason"),
    ),
    Panel(
        "Given up by their callers",
        "Cancelled, or past their deadline, and the phase that they were in.",
        "reqps",
        (("{{reason}} in {{phase}}", "sum by (reason, phase) (rate(lovasz_abandoned_total[$__rate_interval]))"),),
    ),
    Panel(
        "Callers that stalled",
        "Cut off as they stopped sending their request, or taking their answer (--stall-timeout).",
        "reqps",
        per_second("lovasz_stalled_total", "phase"),
    ),
    Panel(
        "Joint steps that wait",
        "Steps of data-parallel trainings that wait for ranks, and the ranks that are there. The server's status page "
        "(GET / on the port of its metrics) and its log name the missing ones.",
        "short",
        (("steps", "sum(lovasz_joint_groups_waiting)"), ("ranks there", "sum(lovasz_joint_ranks_waiting)")),
    ),
    Panel(
        "Longest wait of a joint step",
        "A rank is late or dead if this grows; the step is given up at --joint-timeout.",
        "s",
        (("{{instance}}", "lovasz_joint_oldest_wait_seconds"),),
    ),
    Panel(
        "First rank that the oldest joint step waits for",
        "-1: none waits. One that still sends its tensors counts as missing. All of them, with run and step: status "
        "page.",
        "short",
        (("{{instance}}", "lovasz_joint_oldest_missing_rank"),),
        least=-1,
    ),
    Panel(
        "Joint steps, by outcome",
        "completed; timeout: ranks were missing; left: all ranks went away before it was complete; overloaded: no "
        "room; stopping: the server was.",
        "reqps",
        per_second("lovasz_joint_groups_total", "outcome"),
    ),
    Panel(
        "Answers that are not numbers",
        "Logits were NaN or infinite; a gradient scaler skips such a step.",
        "reqps",
        (("answers", "sum(rate(lovasz_nonfinite_results_total[$__rate_interval]))"),),
    ),
    Panel(
        "Device busy",
        "Share of the time in which it had a batch to compute; 100 %: it is the limit.",
        "percentunit",
        (("{{instance}}", "sum by (instance) (rate(lovasz_device_busy_seconds_total[$__rate_interval]))"),),
    ),
    Panel(
        "Memory of the device",
        "Of the GPU, or of the host; taken by whomever.",
        "bytes",
        (
            ("{{instance}} taken", "lovasz_device_memory_used_bytes"),
            ("{{instance}} in all", "lovasz_device_memory_bytes"),
        ),
    ),
    Panel(
        "Device answers",
        "1: the last known loss came out right.",
        "short",
        (("{{instance}}", "lovasz_device_healthy"),),
    ),
)


TRAINING = (
    Panel(
        "Loss",
        "The last loss of each run. Trainings name themselves: RemoteLoss(..., run=...), or by the run of their joint "
        "steps, which show here what all ranks have together.",
        "short",
        (("{{run}} {{phase}}", 'lovasz_run_loss{run=~"$run"}'),),
    ),
    Panel(
        "Mean IoU",
        "Over classes, of the last fifty requests or so.",
        "percentunit",
        (("{{run}} {{phase}}", 'lovasz_run_miou{run=~"$run"}'),),
    ),
    Panel(
        "Requests a second",
        "Steps, for joint runs.",
        "reqps",
        (("{{run}} {{phase}}", 'rate(lovasz_run_requests_total{run=~"$run"}[$__rate_interval])'),),
    ),
    Panel(
        "IoU of each class, in training",
        "Choose a run at the top; for at most 64 classes.",
        "percentunit",
        (("{{run}}: class {{class}}", 'lovasz_run_class_iou{run=~"$run", phase="train"}'),),
    ),
    Panel(
        "IoU of each class, in evaluation",
        "Calls without a gradient.",
        "percentunit",
        (("{{run}}: class {{class}}", 'lovasz_run_class_iou{run=~"$run", phase="eval"}'),),
    ),
    Panel(
        "Worst classes in training",
        "The five with the lowest IoU.",
        "percentunit",
        (("{{run}}: class {{class}}", 'bottomk(5, lovasz_run_class_iou{run=~"$run", phase="train"})'),),
    ),
)

RUNS = {
    "name": "run",
    "type": "query",
    "datasource": {"type": "prometheus", "uid": "prometheus"},
    "query": "label_values(lovasz_run_loss, run)",
    "refresh": 2,
    "multi": True,
    "includeAll": True,
    "allValue": ".*",
    "current": {"text": "All", "value": "$__all"},
}


def dashboard(uid: str, title: str, panels: tuple[Panel, ...], variables: tuple[Any, ...] = ()) -> dict[str, Any]:
    return {
        "uid": uid,
        "title": title,
        "tags": ["lovasz"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": list(variables)},
        "panels": [_panel(number, panel) for number, panel in enumerate(panels)],
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "prometheus"}
    custom = {"fillOpacity": 40, "stacking": {"mode": "normal"}} if panel.stacked else {"fillOpacity": 5}
    row, column = divmod(number * WIDTH, COLUMNS)
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": source,
        "gridPos": {"x": column, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": panel.least, "custom": custom}, "overrides": []},
        "options": {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": source, "expr": expression, "legendFormat": legend}
            for place, (legend, expression) in enumerate(panel.series)
        ],
    }


FILES = {
    "operations.json": dashboard("lovasz-operations", "Lovász loss service", OPERATIONS),
    "training.json": dashboard("lovasz-training", "Lovász losses of trainings", TRAINING, (RUNS,)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is not up to date")
    check = parser.parse_args().check
    stale = []
    for name, content in FILES.items():
        file, text = FOLDER / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        if check and (not file.exists() or file.read_text() != text):
            stale.append(name)
        elif not check:
            file.write_text(text)
    if stale:
        print(f"not up to date: {', '.join(stale)}; run make docs", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
