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
