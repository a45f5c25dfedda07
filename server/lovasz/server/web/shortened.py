"""What those see of the metrics and the status page who have no token: names of runs are shortened."""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

from lovasz.server.observe.waiting_steps import WaitingStep
from lovasz.server.schedule.job import RUN
from lovasz.server.web.status_page import StatusPage

_SHOWN = 4
"""How many characters of a name are shown, at most half of them."""


class _ShortNames:
    """Shortens names of runs, so that different ones stay different and nobody can find out the rest by trying."""

    def __init__(self) -> None:
        self._key = os.urandom(32)

    def of(self, run: str) -> str:
        """Its first characters, and what tells it apart until the server ends: ``city~1f00ab2c``."""
        mark = hmac.digest(self._key, run.encode(errors="replace"), "sha256").hex()[:8]
        return f"{run[: min(_SHOWN, len(run) // 2)]}~{mark}"

    def in_labels(self, labels: dict[str, str]) -> dict[str, str]:
        """The labels of a sample; ``caller`` may be that of a run, too."""
        if "run" in labels:
            return {**labels, "run": self.of(labels["run"])}
        kind, _, run = labels.get("caller", "").partition(" ")
        return {**labels, "caller": f"{RUN} {self.of(run)}"} if kind == RUN and run else labels


class _ShortenedMetrics(Collector):
    def __init__(self, registry: CollectorRegistry, names: _ShortNames) -> None:
        self._registry, self._names = registry, names

    def describe(self) -> list[Metric]:
        """What it yields."""
        return list(self.collect())

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            shortened = Metric(family.name, family.documentation, family.type, family.unit)
            for sample in family.samples:
                shortened.samples.append(sample._replace(labels=self._names.in_labels(sample.labels)))
            yield shortened


def page_for_strangers(
    registry: CollectorRegistry, waiting_steps: Callable[[], Sequence[WaitingStep]], starting: Callable[[], bool]
) -> StatusPage:
    """The status page, with its metrics, as those see it who have no token."""
    names, shortened = _ShortNames(), CollectorRegistry()
    shortened.register(_ShortenedMetrics(registry, names))
    return StatusPage(shortened, lambda: [replace(step, run=names.of(step.run)) for step in waiting_steps()], starting)
