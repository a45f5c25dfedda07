"""How long the device has computed for each tenant (the metric with the label ``caller``)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from lovasz.server.observe.places import Places

OTHERS = "others"
"""The label of all that are not shown."""


@dataclass
class _Computed:
    seconds: float = 0.0


class Shares(Collector):
    """The callers that have one of ``most`` places; what the device does for callers without one counts for others.

    What is counted once stays where it is: a caller that loses its place adds nothing to others.
    """

    def __init__(self, most: int) -> None:
        self._lock = threading.Lock()
        self._callers = Places(most, _Computed)
        self._others = _Computed()

    def add(self, caller: str, seconds: float) -> None:
        """The device has computed for a caller."""
        with self._lock:
            (self._callers.hear(caller) or self._others).seconds += seconds

    def describe(self) -> list[Metric]:
        """Names what :meth:`collect` yields."""
        return [self._family()]

    def collect(self) -> Iterator[Metric]:
        family = self._family()
        with self._lock:
            shown = [(caller, computed.seconds) for caller, computed in self._callers.items()]
            shown.append((OTHERS, self._others.seconds))
        for caller, seconds in shown:
            family.add_metric([caller], seconds)
        yield family

    @staticmethod
    def _family() -> CounterMetricFamily:
        return CounterMetricFamily(
            "lovasz_caller_device_seconds",
            "Time that the device has computed for a caller, as `token alice`, `run cityscapes` or `host "
            "ipv4:10.0.0.7`. The time of a batch is divided among its callers by cost. At most --max-runs callers are "
            "shown, each for as long as it is active; one that has been silent for a minute makes room for a new one. "
            "Time for callers that are not shown counts for `others`.",
            labels=["caller"],
        )
