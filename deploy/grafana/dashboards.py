"""Writes the dashboards that Grafana is provisioned with: each panel is a line here, and a page of JSON there.

python deploy/grafana/dashboards.py            # make docs
python deploy/grafana/dashboards.py --check    # fails if a file is not as it would be written
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
WIDTH, HEIGHT = 8, 8
COLUMNS = 24
SOURCE = {"type": "prometheus", "uid": "prometheus"}


@dataclass(frozen=True)
class Panel:
    """A plot over time.

    Attributes:
        text: for people who know Prometheus, but not the project.
        unit: one of Grafana's.
        series: pairs of legend and expression.
        values: what is shown for a number in its place.
        exemplars: whether traced requests are marked.
    """

    title: str
    text: str
    unit: str
    series: tuple[tuple[str, str], ...]
    stacked: bool = False
    values: tuple[tuple[int, str], ...] = ()
    exemplars: bool = False


@dataclass(frozen=True)
class Table:
    """What is now, a row for each server and run.

    Attributes:
        columns: heading, unit and metric of each.
    """

    title: str
    text: str
    columns: tuple[tuple[str, str, str], ...]


Sections = Mapping[str, Sequence[Panel | Table]]


def per_second(metric: str, by: str) -> tuple[tuple[str, str], ...]:
    return ((f"{{{{{by}}}}}", f"sum by ({by}) (rate({metric}[$__rate_interval]))"),)


def quantile(share: float, metric: str, by: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({labels}) (rate({metric}_bucket[$__rate_interval])))"


def quantiles(metric: str, shares: tuple[float, ...] = (0.5, 0.9, 0.99)) -> tuple[tuple[str, str], ...]:
    return tuple((f"p{100 * share:.0f}", quantile(share, metric)) for share in shares)


REQUESTS = (
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
        "Size of requests",
        "Logits and labels, without the gradient.",
        "bytes",
        quantiles("lovasz_request_bytes"),
    ),
)

TIME = (
    Panel(
        "Where a request spends its time",
        "Seconds in each phase for each request that was computed, stacked: receiving the payload, waiting for the "
        "other ranks of a joint step, waiting for the device, computing, copying the gradient to the host, sending. "
        "The time of failed requests is in it.",
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
        "Which phase slow requests are slow in; also those that failed, in their last phase. Points: single requests "
        "whose callers record traces.",
        "s",
        (("{{phase}}", quantile(0.99, "lovasz_phase_seconds", "phase")),),
        exemplars=True,
    ),
    Panel("Queue", "Requests that wait for the device.", "short", (("requests", "sum(lovasz_queue_requests)"),)),
)

JOINT_STEPS = (
    Table(
        "Joint steps that wait, and whom for",
        "Of each run the step that has waited longest. A rank that still sends its tensors counts as missing. The "
        "server's log and its status page (GET / on the port of its metrics) name all missing ranks.",
        (
            ("step", "none", "lovasz_joint_step_number"),
            ("waits for rank", "none", "lovasz_joint_step_first_missing_rank"),
            ("missing ranks", "none", "lovasz_joint_step_missing_ranks"),
            ("since", "s", "lovasz_joint_step_wait_seconds"),
        ),
    ),
    Panel(
        "Wait of joint steps",
        "A rank is late or dead where this grows; the step is given up at --joint-timeout.",
        "s",
        (("{{run}}", "lovasz_joint_step_wait_seconds"),),
    ),
    Panel(
        "Rank that joint steps wait for",
        "The number of the first that is missing. One that stands out here is slow, or dead.",
        "none",
        (("{{run}}", "lovasz_joint_step_first_missing_rank"),),
    ),
    Panel(
        "Joint steps that wait",
        "Steps of data-parallel trainings that wait for ranks, and the ranks that are there.",
        "short",
        (("steps", "sum(lovasz_joint_groups_waiting)"), ("ranks there", "sum(lovasz_joint_ranks_waiting)")),
    ),
    Panel(
        "Joint steps, by outcome",
        "completed; timeout: ranks were missing; left: all ranks went away before it was complete; overloaded: no "
        "room; stopping: the server was.",
        "reqps",
        per_second("lovasz_joint_groups_total", "outcome"),
    ),
)

ROOM = (
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
)

DEVICE = (
    Panel(
        "Device busy",
        "Share of the time in which it had a batch to compute; 100 %: it is the limit.",
        "percentunit",
        (("{{instance}}", "sum by (instance) (rate(lovasz_device_busy_seconds_total[$__rate_interval]))"),),
    ),
    Panel(
        "Device at work",
        "For whomever: GPU time as the driver counts it, or the host's processors for a CPU.",
        "percentunit",
        (("{{instance}}", "lovasz_device_utilization_ratio"),),
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
        "Whether the last known loss came out right.",
        "none",
        (("{{instance}}", "lovasz_device_healthy"),),
        values=((0, "no"), (1, "yes")),
    ),
    Panel(
        "Logits computed a second",
        "Of all requests.",
        "short",
        (("logits", "sum(rate(lovasz_elements_total[$__rate_interval]))"),),
    ),
)

REFUSED = (
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
        (
            (
                "{{reason}} in {{phase}}",
                "sum by (reason, phase) (rate(lovasz_abandoned_total[$__rate_interval]))",
            ),
        ),
    ),
    Panel(
        "Callers that stalled",
        "Cut off as they stopped sending their request, or taking their answer (--stall-timeout).",
        "reqps",
        per_second("lovasz_stalled_total", "phase"),
    ),
    Panel(
        "Answers that are not numbers",
        "Logits were NaN or infinite; a gradient scaler skips such a step.",
        "reqps",
        (("answers", "sum(rate(lovasz_nonfinite_results_total[$__rate_interval]))"),),
    ),
)

OPERATIONS: Sections = {
    "Requests": REQUESTS,
    "Time": TIME,
    "Joint steps": JOINT_STEPS,
    "Room": ROOM,
    "Device": DEVICE,
    "Refused, given up, not finite": REFUSED,
}


RUNS = (
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
)

CLASSES = (
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

TRAINING: Sections = {
    "Runs": RUNS,
    "Classes": CLASSES,
}

RUN = {
    "name": "run",
    "type": "query",
    "datasource": SOURCE,
    "query": "label_values(lovasz_run_loss, run)",
    "refresh": 2,
    "multi": True,
    "includeAll": True,
    "allValue": ".*",
    "current": {"text": "All", "value": "$__all"},
}


def dashboard(uid: str, title: str, sections: Sections, variables: tuple[Any, ...] = ()) -> dict[str, Any]:
    return {
        "uid": uid,
        "title": title,
        "tags": ["lovasz"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": list(variables)},
        "panels": list(_laid_out(sections)),
    }


def _laid_out(sections: Sections) -> Iterator[dict[str, Any]]:
    """Each section below its heading, its panels side by side."""
    top, numbers = 0, itertools.count(1)
    for heading, panels in sections.items():
        place = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
        yield {"id": next(numbers), "type": "row", "title": heading, "collapsed": False, "gridPos": place, "panels": []}
        top += 1
        for number, panel in enumerate(panels):
            row, column = divmod(number * WIDTH, COLUMNS)
            drawn = _plot(panel) if isinstance(panel, Panel) else _table(panel)
            yield {
                "id": next(numbers),
                "title": panel.title,
                "description": panel.text,
                "datasource": SOURCE,
                "gridPos": {"x": column, "y": top + row * HEIGHT, "w": WIDTH, "h": HEIGHT},
                **drawn,
            }
        top += HEIGHT * -(-len(panels) * WIDTH // COLUMNS)


def _plot(panel: Panel) -> dict[str, Any]:
    custom = {"fillOpacity": 40, "stacking": {"mode": "normal"}} if panel.stacked else {"fillOpacity": 5}
    names = {str(value): {"text": text, "index": place} for place, (value, text) in enumerate(panel.values)}
    mappings = [{"type": "value", "options": names}] if names else []
    defaults = {"unit": panel.unit, "min": 0, "custom": custom, "mappings": mappings}
    return {
        "type": "timeseries",
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {**_target(place, expression), "legendFormat": legend, "exemplar": panel.exemplars}
            for place, (legend, expression) in enumerate(panel.series)
        ],
    }


def _table(table: Table) -> dict[str, Any]:
    targets = [
        {**_target(place, f"max by (instance, run) ({metric})"), "format": "table", "instant": True}
        for place, (_, _, metric) in enumerate(table.columns)
    ]
    # Grafana names a value by the query that it is from.
    headings = {
        f"Value #{target['refId']}": heading for target, (heading, _, _) in zip(targets, table.columns, strict=True)
    }
    units = [
        {"matcher": {"id": "byName", "options": heading}, "properties": [{"id": "unit", "value": unit}]}
        for heading, unit, _ in table.columns
    ]
    return {
        "type": "table",
        "fieldConfig": {"defaults": {}, "overrides": units},
        "options": {"showHeader": True},
        "targets": targets,
        "transformations": [
            {"id": "merge", "options": {}},
            {"id": "organize", "options": {"excludeByName": {"Time": True}, "renameByName": headings}},
        ],
    }


def _target(place: int, expression: str) -> dict[str, Any]:
    return {"refId": chr(ord("A") + place), "datasource": SOURCE, "expr": expression}


FILES = {
    "operations.json": dashboard("lovasz-operations", "Lovász loss service", OPERATIONS),
    "training.json": dashboard("lovasz-training", "Lovász losses of trainings", TRAINING, (RUN,)),
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
