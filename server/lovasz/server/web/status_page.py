"""The status page for people, and the numbers that it shows."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from prometheus_client import CollectorRegistry

from lovasz.server.observe.waiting_steps import WaitingStep

_STEPS_SHOWN = 50


class StatusPage:
    """The page, and the numbers that the page asks for every second.

    Attributes:
        registry: the metrics that it shows.
        html: the page.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        waiting_steps: Callable[[], Sequence[WaitingStep]],
        starting: Callable[[], bool],
    ) -> None:
        self.registry, self._waiting_steps, self._starting = registry, waiting_steps, starting
        self._started = time.monotonic()
        self.html = files("lovasz.server.web").joinpath("status.html").read_bytes()

    def numbers(self) -> bytes:
        """The numbers as JSON: the samples of every metric, by name, and the joint steps that wait.

        The buckets of histograms are left out. NaN is null.
        """
        samples: dict[str, list[list[Any]]] = {}
        for family in self.registry.collect():
            for sample in family.samples:
                if not sample.name.endswith(("_bucket", "_created")):
                    value = sample.value if math.isfinite(sample.value) else None  # JSON has no NaN.
                    samples.setdefault(sample.name, []).append([sample.labels, value])
        status = {
            "uptime_seconds": time.monotonic() - self._started,
            "starting": self._starting(),
            "samples": samples,
            "joint_steps": [asdict(step) for step in self._waiting_steps()[:_STEPS_SHOWN]],
        }
        return json.dumps(status).encode()
