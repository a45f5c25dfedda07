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

from lovasz.server.observe.metrics import PHASES

FOLDER = Path(__file__).parent / "dashboards"
WIDTH, HEIGHT = 8, 8
COLUMNS = 24
TABLE_HEIGHT = 8
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Panel:
    """A plot over time.

    Attributes:
        text: for people who know Prometheus, but not the project.
        unit: one of Grafana's.
        series: pairs of legend and expression.
        most: the end of the axis, where that is known.
        exemplars: whether traced requests are marked.
    """

    title: str
    text: str
    unit: str
    series: tuple[tuple[str, str], ...]
    stacked: bool = False
    most: int | None = None
    exemplars: bool = False


@dataclass(frozen=True)
class Table:
    """What is now, over the whole width.

    Attributes:
        queries: what comes to one table; each is of samples that differ in their labels.
        headings: the columns from left to right, each with Grafana's name for it: a label, or the value of a query.
        unit: of each column whose numbers have one.
        matrix: label of the rows, and of the columns, of a table of a single query.
        empty: what is shown where there is nothing.
    """

    title: str
    text: str
    queries: tuple[str, ...]
    headings: Mapping[str, str]
    unit: Mapping[str, str]
    sorted_by: str
    empty: str
    matrix: tuple[str, str] | None = None


Sections = Mapping[str, Sequence[Panel | Table]]


def of(metric: str, **labels: str) -> str:
    """Of the servers that were chosen, with these labels; a value that begins with ~ is a pattern."""
    chosen = {"instance": "~$instance", **labels}
    matchers = [f'{name}=~"{value[1:]}"' if value[0] == "~" else f'{name}="{value}"' for name, value in chosen.items()]
    return f"{metric}{{{', '.join(matchers)}}}"


def rate(metric: str, **labels: str) -> str:
    return f"rate({of(metric, **labels)}[$__rate_interval])"


def rise(metric: str, by: str) -> tuple[tuple[str, str], ...]:
    """How often in the last minute; for what is rare."""
    legend = " in ".join(f"{{{{{label}}}}}" for label in by.split(", "))
    return ((legend, f"sum by ({by}) (increase({of(metric)}[1m]))"),)


def quantile(share: float, metric: str, by: str = "le", **labels: str) -> str:
    return f"histogram_quantile({share}, sum by ({by}) ({rate(f'{metric}_bucket', **labels)}))"


def mean(metric: str) -> str:
    return f"sum({rate(f'{metric}_sum')}) / sum({rate(f'{metric}_count')})"


REQUESTS = (
    Panel(
        "Servers that answer Prometheus",
        "0: that server is down, and the other panels show nothing of it, or what was before.",
        "short",
        (("{{instance}}", of("up", job="lovasz")),),
        most=1,
    ),
    Panel(
        "Requests a second, by outcome",
        "gRPC status codes. INVALID_ARGUMENT, FAILED_PRECONDITION: the caller's mistake. RESOURCE_EXHAUSTED: want of "
        "room. ABORTED: a joint step that was given up, or a caller that stalled. CANCELLED, DEADLINE_EXCEEDED: the "
        "caller gave up. UNAVAILABLE: the server was stopping, or its device did not answer. INTERNAL: a fault of the "
        "server. A refused call that its client makes again counts each time.",
        "reqps",
        (("{{code}}", f"sum by (code) ({rate('lovasz_requests_total')})"),),
    ),
    Panel(
        "Share of requests that failed",
        "All codes but OK. Clients make calls that end with RESOURCE_EXHAUSTED or UNAVAILABLE again: their "
        "trainers may have noticed nothing.",
        "percentunit",
        (
            (
                "failed",
                f"1 - sum({rate('lovasz_requests_total', code='OK')}) / sum({rate('lovasz_requests_total')})",
            ),
        ),
        most=1,
    ),
    Panel(
        "Time of a request",
        "From its header to the end of its answer, or to its failure. As fine as the classes of the histogram: 0.1, "
        "0.2, 0.5, 1, 2, 5 ... Points: single requests whose callers record traces.",
        "s",
        tuple(
            (f"p{100 * share:.0f} {outcome}", quantile(share, "lovasz_request_seconds", outcome=outcome))
            for outcome, share in (("answered", 0.5), ("answered", 0.9), ("answered", 0.99), ("failed", 0.99))
        ),
        exemplars=True,
    ),
)

TIME = (
    Table(
        "Which phase slow requests spend their time in",
        "A row for requests that took more than 10, 1, 0.1, 0.01 s, or less: the share of their time in each phase, in "
        "the last five minutes. receive: header and payload; joint: waiting for the other ranks of the step; queue: "
        "waiting for the device; compute: the batch; copy: of the batch's gradients to the host; send. Those that "
        "failed count, too.",
        (
            f"sum by (over, phase) (rate({of('lovasz_class_phase_seconds_total')}[5m])) / on (over) group_left () "
            f"(sum by (over) (rate({of('lovasz_class_phase_seconds_total')}[5m])) > 0)",
        ),
        {"over\\phase": "took longer than, s", **{phase: phase for phase in PHASES}},
        dict.fromkeys(PHASES, "percentunit"),
        sorted_by="took longer than, s",
        empty="no requests, or no server answers",
        matrix=("over", "phase"),
    ),
    Panel(
        "How many took how long",
        "Requests a second that took more than so many seconds, and no more than the next class: the rows above.",
        "reqps",
        (("over {{over}} s", f"sum by (over) ({rate('lovasz_class_requests_total')})"),),
    ),
    Panel(
        "Where a request spends its time",
        "Mean seconds in each phase, for each request that was let in, stacked. Joint steps that wait in vain count.",
        "s",
        (
            (
                "{{phase}}",
                f"sum by (phase) ({rate('lovasz_phase_seconds_sum')}) "
                f"/ scalar(sum({rate('lovasz_phase_seconds_count', phase='receive')}) > 0)",
            ),
        ),
        stacked=True,
    ),
    Panel(
        "99th percentile of each phase",
        "Of each phase by itself: these are not phases of the same requests. Points: traced requests.",
        "s",
        (("{{phase}}", quantile(0.99, "lovasz_phase_seconds", by="le, phase")),),
        exemplars=True,
    ),
    Panel(
        "Queue",
        "Requests that wait for the device.",
        "short",
        (("{{instance}}", of("lovasz_queue_requests")),),
    ),
)

JOINT_STEPS = (
    Table(
        "Joint steps that wait, and whom for",
        "Of each run the step that has waited longest. A rank that still sends its tensors counts as missing. The "
        "server's log and its status page (GET / on the port of its metrics) name all missing ranks.",
        tuple(
            f"max by (instance, run) ({of(f'lovasz_joint_step_{what}')})"
            for what in ("number", "first_missing_rank", "missing_ranks", "wait_seconds")
        ),
        {
            "run": "run",
            "Value #A": "step",
            "Value #B": "first missing rank",
            "Value #C": "how many are missing",
            "Value #D": "has waited for",
            "instance": "server",
        },
        {"has waited for": "s"},
        sorted_by="has waited for",
        empty="no step waits, or no server answers",
    ),
    Panel(
        "Wait of joint steps",
        "A rank is late or dead where this grows; the step is given up at --joint-timeout.",
        "s",
        (("{{run}} ({{instance}})", of("lovasz_joint_step_wait_seconds")),),
    ),
    Panel(
        "Joint steps and ranks there",
        "Steps of data-parallel trainings that wait for ranks, and the ranks that are there.",
        "short",
        (
            ("steps", f"sum({of('lovasz_joint_groups_waiting')})"),
            ("ranks there", f"sum({of('lovasz_joint_ranks_waiting')})"),
        ),
    ),
    Panel(
        "Joint steps in the last minute, by outcome",
        "completed; timeout: ranks were missing; left: all ranks went away before it was complete; overloaded: no "
        "room; stopping: the server was.",
        "short",
        rise("lovasz_joint_groups_total", "outcome"),
    ),
)

ROOM = (
    Panel(
        "Memory",
        "Tensor bytes of the requests held; the budget beyond which requests are refused (--memory-budget); buffers "
        "that wait for the next requests; and all that the process has of the host.",
        "bytes",
        (
            ("{{instance}} held", of("lovasz_in_flight_bytes")),
            ("{{instance}} budget", of("lovasz_budget_bytes")),
            ("{{instance}} kept for the next", of("lovasz_staging_idle_bytes")),
            (
                "{{instance}} whole process",
                f"{of('process_resident_memory_bytes')} and on (instance) lovasz_build_info",
            ),
        ),
    ),
    Panel(
        "Requests held",
        "And how many may be (--max-requests). A joint step holds one for each of its ranks from the first on.",
        "short",
        (
            ("{{instance}} held", of("lovasz_in_flight_requests")),
            ("{{instance}} at most", of("lovasz_max_requests")),
        ),
    ),
    Panel(
        "Requests in a batch",
        "Mean; 1: nothing shares the device.",
        "short",
        (("requests", mean("lovasz_batch_requests")),),
    ),
    Panel(
        "Size of requests",
        "Logits and labels, without the gradient.",
        "bytes",
        (("mean", mean("lovasz_request_bytes")), ("p99", quantile(0.99, "lovasz_request_bytes"))),
    ),
    Panel(
        "Logits computed a second",
        "Of all requests.",
        "short",
        (("logits", f"sum({rate('lovasz_elements_total')})"),),
    ),
)

DEVICE = (
    Panel(
        "Busy with batches",
        "Share of the time in which the server's device had a batch to compute; 100 %: it is the limit.",
        "percentunit",
        (("{{instance}}", f"sum by (instance) ({rate('lovasz_device_busy_seconds_total')})"),),
        most=1,
    ),
    Panel(
        "Utilization by anyone",
        "GPU time as the driver counts it, or the host's processors for a CPU.",
        "percentunit",
        (("{{instance}}", of("lovasz_device_utilization_ratio")),),
        most=1,
    ),
    Panel(
        "Memory of the device",
        "Of the GPU, or of the host; taken by whomever.",
        "bytes",
        (
            ("{{instance}} taken", of("lovasz_device_memory_used_bytes")),
            ("{{instance}} in all", of("lovasz_device_memory_bytes")),
        ),
    ),
    Panel(
        "Healthy",
        "1: the device gave the right answer to a known loss when last asked, and is not stuck in a batch.",
        "short",
        (("{{instance}}", of("lovasz_device_healthy")),),
        most=1,
    ),
)

REFUSED = (
    Panel(
        "Refused in the last minute, by reason",
        "no_bytes, no_requests: come again later (--memory-budget, --max-requests); too_large: can never fit; invalid: "
        "the caller's mistake; mismatch: a rank that does not fit its joint step; stopping: the server was.",
        "short",
        rise("lovasz_rejections_total", "reason"),
    ),
    Panel(
        "Given up by their callers in the last minute",
        "Cancelled, or past their deadline, and the phase that they were in.",
        "short",
        rise("lovasz_abandoned_total", "reason, phase"),
    ),
    Panel(
        "Callers that stalled in the last minute",
        "Cut off as they stopped sending their request, or taking their answer (--stall-timeout). The log names "
        "the former.",
        "short",
        rise("lovasz_stalled_total", "phase"),
    ),
    Panel(
        "Answers in the last minute that are not numbers",
        "Logits were NaN or infinite; a gradient scaler skips such a step. The loss of a run that names itself has a "
        "gap then, on the other dashboard.",
        "short",
        (("answers", f"sum(increase({of('lovasz_nonfinite_results_total')}[1m]))"),),
    ),
)

OPERATIONS: Sections = {
    "Requests": REQUESTS,
    "Joint steps": JOINT_STEPS,
    "Time": TIME,
    "Room": ROOM,
    "Device": DEVICE,
    "Refused, given up, not finite": REFUSED,
}


def of_runs(metric: str, **labels: str) -> str:
    return of(metric, run="~$run", **labels)


RUNS = (
    Panel(
        "Loss",
        "The last loss of each run; a gap: it was NaN. Trainings name themselves: RemoteLoss(..., run=...), or by the "
        "run of their joint steps, which show here what all ranks have together. A run that sends nothing for a "
        "quarter of an hour is gone.",
        "short",
        (("{{run}} {{mode}} ({{instance}})", of_runs("lovasz_run_loss")),),
    ),
    Panel(
        "Mean IoU",
        "Over classes, of the last fifty requests or so. Steps whose loss is NaN leave it as it was.",
        "percentunit",
        (("{{run}} {{mode}} ({{instance}})", of_runs("lovasz_run_miou")),),
        most=1,
    ),
    Panel(
        "Requests a second",
        "Steps, for joint runs.",
        "reqps",
        (("{{run}} {{mode}} ({{instance}})", f"rate({of_runs('lovasz_run_requests_total')}[$__rate_interval])"),),
    ),
)

CLASSES = (
    Panel(
        "IoU of each class, in training",
        "For at most 64 classes. With several runs, choose one at the top.",
        "percentunit",
        (("{{run}}: class {{class}}", of_runs("lovasz_run_class_iou", mode="train")),),
        most=1,
    ),
    Panel(
        "IoU of each class, in evaluation",
        "Calls without a gradient.",
        "percentunit",
        (("{{run}}: class {{class}}", of_runs("lovasz_run_class_iou", mode="eval")),),
        most=1,
    ),
    Panel(
        "Worst classes in training",
        "The five with the lowest IoU at each time, of each run.",
        "percentunit",
        (("{{run}}: class {{class}}", f"bottomk by (run) (5, {of_runs('lovasz_run_class_iou', mode='train')})"),),
        most=1,
    ),
)

TRAINING: Sections = {
    "Runs": RUNS,
    "Classes": CLASSES,
}

CHOICE_OF_SOURCE = {
    "name": "datasource",
    "label": "data source",
    "type": "datasource",
    "query": "prometheus",
    "current": {"text": "Prometheus", "value": "prometheus"},
}


def choice(name: str, label: str, query: str) -> dict[str, Any]:
    """A variable, of which all values are chosen at first."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": query,
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


SERVERS = choice("instance", "server", "label_values(lovasz_build_info, instance)")
CHOICE_OF_RUNS = choice("run", "run", "label_values(lovasz_run_loss, run)")


def dashboard(uid: str, title: str, sections: Sections, variables: Sequence[Any]) -> dict[str, Any]:
    return {
        "uid": uid,
        "title": title,
        "tags": ["lovasz"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "graphTooltip": 1,
        "links": [{"type": "dashboards", "tags": ["lovasz"], "title": "Lovász", "includeVars": True, "keepTime": True}],
        "templating": {"list": [CHOICE_OF_SOURCE, *variables]},
        "panels": list(_laid_out(sections)),
    }


def _laid_out(sections: Sections) -> Iterator[dict[str, Any]]:
    """Each section below its heading: tables over the whole width, plots side by side."""
    top, numbers = 0, itertools.count(1)
    for heading, panels in sections.items():
        place = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
        yield {"id": next(numbers), "type": "row", "title": heading, "collapsed": False, "gridPos": place, "panels": []}
        top, left, height = top + 1, 0, 0
        for panel in panels:
            width = WIDTH if isinstance(panel, Panel) else COLUMNS
            if left + width > COLUMNS:
                top, left = top + height, 0
            height = HEIGHT if isinstance(panel, Panel) else TABLE_HEIGHT
            yield {
                "id": next(numbers),
                "title": panel.title,
                "description": panel.text,
                "datasource": SOURCE,
                "gridPos": {"x": left, "y": top, "w": width, "h": height},
                **(_plot(panel) if isinstance(panel, Panel) else _table(panel)),
            }
            left += width
        top += height


def _plot(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "custom": {"fillOpacity": 5}}
    if panel.stacked:
        defaults["custom"] = {"fillOpacity": 40, "stacking": {"mode": "normal"}}
    if panel.most is not None:
        defaults["max"] = panel.most
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
    together: dict[str, Any] = {"id": "merge", "options": {}}
    if table.matrix is not None:
        rows, columns = table.matrix
        options = {"rowField": rows, "columnField": columns, "valueField": "Value"}
        together = {"id": "groupingToMatrix", "options": options}
    order = {name: place for place, name in enumerate(table.headings)}
    organized = {"excludeByName": {"Time": True}, "indexByName": order, "renameByName": dict(table.headings)}
    return {
        "type": "table",
        "fieldConfig": {
            "defaults": {"noValue": table.empty},
            "overrides": [
                {"matcher": {"id": "byName", "options": heading}, "properties": [{"id": "unit", "value": unit}]}
                for heading, unit in table.unit.items()
            ],
        },
        "options": {"showHeader": True, "sortBy": [{"displayName": table.sorted_by, "desc": True}]},
        "targets": [
            {**_target(place, query), "format": "table", "instant": True} for place, query in enumerate(table.queries)
        ],
        "transformations": [together, {"id": "organize", "options": organized}],
    }


def _target(place: int, expression: str) -> dict[str, Any]:
    return {"refId": chr(ord("A") + place), "datasource": SOURCE, "expr": expression}


FILES = {
    "operations.json": dashboard("lovasz-operations", "Lovász loss service", OPERATIONS, [SERVERS]),
    "training.json": dashboard("lovasz-training", "Lovász losses of trainings", TRAINING, [SERVERS, CHOICE_OF_RUNS]),
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
