"""Counters and histograms that every request changes: one lock, which is taken once for many of them.

Those of prometheus_client take a lock and several calls for each value, and each request changes about twenty.
"""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar, Sample
from prometheus_client.utils import floatToGoString


class Count:
    """A number that only grows."""

    def __init__(self) -> None:
        """Begins at 0."""
        self.value = 0.0
        self._created = time.time()

    def samples(self) -> Iterator[Sample]:
        """Its samples; the name of the metric and the labels of the series come before theirs."""
        yield Sample("_total", {}, self.value)
        yield Sample("_created", {}, self._created)


class Distribution:
    """Values, counted by bucket."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """Has no value yet.

        Args:
            bounds: the largest value of each bucket, in ascending order; the last bucket has none.
        """
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._exemplars: list[Exemplar | None] = [None] * (len(bounds) + 1)
        self._sum = 0.0
        self._created = time.time()

    def add(self, value: float, trace: dict[str, str] | None = None) -> None:
        """Counts a value.

        Args:
            trace: the labels of the bucket's exemplar from now on; None: the bucket keeps the one that it has.
        """
        bucket = bisect_left(self._bounds, value)
        self._counts[bucket] += 1
        self._sum += value
        if trace is not None:
            self._exemplars[bucket] = Exemplar(trace, value, time.time())

    def samples(self) -> Iterator[Sample]:
        """As those of :class:`Count`."""
        counts = list(accumulate(self._counts))
        for bound, count, exemplar in zip((*self._bounds, math.inf), counts, self._exemplars, strict=True):
            le = floatToGoString(bound)
            yield Sample("_bucket", {"le": le}, count, None, exemplar)
        yield Sample("_count", {}, counts[-1])
        yield Sample("_sum", {}, self._sum)
        yield Sample("_created", {}, self._created)


SeriesT = TypeVar("SeriesT", Count, Distribution)


class Tally(Collector, Generic[SeriesT]):
    """A metric with one series for each combination of label values that somebody asked for."""

    def __init__(
        self,
        name: str,
        text: str,
        kind: str,
        labels: Sequence[str],
        begin: Callable[[], SeriesT],
        lock: threading.RLock,
    ) -> None:
        self._name, self._text, self._kind, self._labels = name, text, kind, labels
        self._begin: Callable[[], SeriesT] = begin
        self._lock = lock
        self._series: dict[tuple[str, ...], SeriesT] = {}

    def series(self, *values: str) -> SeriesT:
        """The series of these label values, which begins now if it is new. Not called while the lock is held."""
        series = self._series.get(values)
        if series is None:
            with self._lock:
                series = self._series.setdefault(values, self._begin())
        return series

    def keep(self, is_kept: Callable[..., bool]) -> None:
        """Forgets the series for whose label values ``is_kept`` is false."""
        with self._lock:
            self._series = {values: series for values, series in self._series.items() if is_kept(*values)}

    def describe(self) -> list[Metric]:
        """Names what :meth:`collect` yields."""
        return [Metric(self._name, self._text, self._kind)]

    def collect(self) -> Iterator[Metric]:
        (metric,) = self.describe()
        shows_created = _shows_created()
        with self._lock:
            shown = list(self._series.items())
        for values, series in shown:
            with self._lock:  # For each one alone: there are hundreds, and requests wait meanwhile.
                samples = list(series.samples())
            labels = dict(zip(self._labels, values, strict=True))
            for sample in samples:
                if sample.name == "_created" and not shows_created:
                    continue
                name = self._name + sample.name
                metric.add_sample(name, {**labels, **sample.labels}, sample.value, None, sample.exemplar)
        yield metric


def _shows_created() -> bool:
    """Whether prometheus_client shows when metrics began: not with ``PROMETHEUS_DISABLE_CREATED_SERIES``."""
    (metric,) = Counter("any", "Any.", registry=None).collect()
    return any(sample.name == "any_created" for sample in metric.samples)


class Tallies:
    """Metrics that share a lock.

    Attributes:
        lock: held while any of their series is changed.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        """There are none yet.

        Args:
            registry: shows them.
        """
        # The garbage collector may end a call, which is counted, in a thread that holds it.
        self.lock = threading.RLock()
        self._registry = registry

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Tally[Count]:
        tally = Tally(name, text, "counter", labels, Count, self.lock)
        self._registry.register(tally)
        return tally

    def histogram(
        self, name: str, text: str, labels: Sequence[str] = (), *, buckets: Sequence[float]
    ) -> Tally[Distribution]:
        tally = Tally(name, text, "histogram", labels, lambda: Distribution(buckets), self.lock)
        self._registry.register(tally)
        return tally
