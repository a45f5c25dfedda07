"""How long the device has computed for each tenant: the metric with the label ``caller``."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

OTHERS = "others"
"""The label of all that are not shown."""


class Shares(Collector):
    """The ``most`` callers that were computed for last; what the device did for earlier ones counts for others."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._seconds: OrderedDict[str, float] = OrderedDict()
        self._others = 0.0

    def add(self, caller: str, seconds: float) -> None:
        """The device has computed for a caller."""
        with self._lock:
            self._seconds[caller] = self._seconds.get(caller, 0.0) + seconds
            self._seconds.move_to_end(caller)
            if len(self._seconds) > self._most:
                self._others += self._seconds.popitem(last=False)[1]

    def describe(self) -> list[Metric]:
        """Names what :meth:`collect` yields."""
        return [self._family()]

    def collect(self) -> Iterator[Metric]:
        family = self._family()
        with self._lock:
            shown = [*self._seconds.items(), (OTHERS, self._others)]
        for caller, seconds in shown:
            family.add_metric([caller], seconds)
        yield family

    @staticmethod
    def _family() -> CounterMetricFamily:
        return CounterMetricFamily(
            "lovasz_caller_device_seconds",
            "Time that the device has computed for a caller, as `token alice`, `run cityscapes` or `host "
            "ipv4:10.0.0.7`. The time of a batch is divided among its callers by cost. Shown are the --max-runs "
            "callers that were served last, and all others together as `others`.",
            labels=["caller"],
        )
