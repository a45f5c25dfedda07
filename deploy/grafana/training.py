"""The dashboard for those who train."""

from __future__ import annotations

from deploy.grafana.panels import Panel, Sections
from deploy.grafana.promql import of


def of_runs(metric: str, **labels: str) -> str:
    """The metric of the selected servers and runs."""
    return of(metric, run="~$run", **labels)


RUNS = (
    Panel(
        "Loss",
        "The last loss of each run; a gap: it was NaN. A training gets its name from RemoteLoss(..., run=...), or from "
        "the run of its joint steps, which show the result of all ranks together. A run that sends nothing for 15 "
        "minutes disappears.",
        "short",
        (("{{run}} {{mode}} ({{instance}})", of_runs("lovasz_run_loss")),),
    ),
    Panel(
        "Mean IoU",
        "Over classes, of the last fifty requests or so. Steps whose loss is NaN do not change it.",
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
