"""The joint steps that wait, and the ranks that they wait for: the metrics named ``lovasz_joint_step_...``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


@dataclass(frozen=True)
class WaitingStep:
    """Describes a joint step that waits for ranks.

    Attributes:
        seconds: how long it has waited.
        missing: the ranks that it waits for, as text.
        evaluation: whether it is a step without a gradient.
        never_evaluated: those of the missing ranks that have made no step without a gradient, as text.
    """

    run: str
    step: int
    seconds: float
    world_size: int
    missing: str
    missing_ranks: int
    first_missing_rank: int
    evaluation: bool = False
    never_evaluated: str = ""


_METRICS: dict[str, tuple[str, Callable[[WaitingStep], float]]] = {
    "wait_seconds": (
        "How long the joint step of a run that has waited longest has waited.",
        lambda step: step.seconds,
    ),
    "number": ("The number of the joint step of a run that has waited longest.", lambda step: step.step),
    "missing_ranks": (
        "How many ranks are missing in the joint step of a run that has waited longest.",
        lambda step: step.missing_ranks,
    ),
    "first_missing_rank": (
        "The first rank that is missing in the joint step of a run that has waited longest.",
        lambda step: step.first_missing_rank,
    ),
}


class WaitingSteps(Collector):
    """Shows one step for each run, the one that has waited longest, and a bounded number of runs."""

    def __init__(self, waiting: Callable[[], Sequence[WaitingStep]], max_runs: int) -> None:
        """Reads the steps each time that it is scraped.

        Args:
            waiting: returns the steps that wait, the one that has waited longest first.
            max_runs: how many runs are shown.
        """
        self._waiting, self._max_runs = waiting, max_runs

    def describe(self) -> list[Metric]:
        """Names what :meth:`collect` yields."""
        return [family for family, _ in _families()]

    def collect(self) -> Iterator[Metric]:
        longest: dict[str, WaitingStep] = {}
        for step in self._waiting():
            longest.setdefault(step.run, step)
        for family, read in _families():
            for run, step in islice(longest.items(), self._max_runs):
                family.add_metric([run], read(step))
            yield family


def _families() -> Iterator[tuple[GaugeMetricFamily, Callable[[WaitingStep], float]]]:
    for name, (text, read) in _METRICS.items():
        yield GaugeMetricFamily(f"lovasz_joint_step_{name}", text, labels=["run"]), read
