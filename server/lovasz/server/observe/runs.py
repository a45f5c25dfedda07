"""The loss and IoU of each training run that has a name: the metrics with the label ``run``."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from lovasz.server.observe.places import Places

MAX_CLASSES_SHOWN = 64
"""The IoU of each class is shown for up to this many classes, so that a run has a bounded number of series."""
SHOWN_SECONDS = 900.0
"""A run that has sent nothing for this long is not shown, so that a graph ends with its run. Training and evaluation
count separately."""
_KEPT_SHARE = 0.98
"""Each request multiplies the counts of earlier ones by this: IoU is that of about the last fifty requests."""
_MODES = {True: "train", False: "eval"}


@dataclass
class _Mode:
    loss: float
    intersection: npt.NDArray[np.float64]
    union: npt.NDArray[np.float64]
    requests: int
    heard: float


class Runs(Collector):
    """The runs that have one of ``max_runs`` places. A joint step counts once, by the request of rank 0."""

    def __init__(self, max_runs: int) -> None:
        self._lock = threading.Lock()
        self._runs = Places[dict[str, _Mode]](max_runs, dict)

    def observe(
        self,
        run: str,
        want_grad: bool,
        loss: float,
        intersection: npt.NDArray[np.int64],
        union: npt.NDArray[np.int64],
    ) -> None:
        """Records an answer, if its run has a place.

        Args:
            want_grad: whether it is a step of training, not of evaluation.
            intersection: int64, shape (C,), as ``union``: see ``lovasz.spec.Result``.
        """
        with self._lock:
            modes = self._runs.hear(run)
            if modes is None:
                return
            before = modes.get(_MODES[want_grad])
            if before is None or before.union.shape != union.shape:
                before = _Mode(loss, np.zeros(union.shape), np.zeros(union.shape), 0, 0.0)
            modes[_MODES[want_grad]] = _Mode(
                loss,
                _KEPT_SHARE * before.intersection + intersection,
                _KEPT_SHARE * before.union + union,
                before.requests + 1,
                time.monotonic(),
            )

    def describe(self) -> list[Metric]:
        """Names what :meth:`collect` yields."""
        return list(self._families())

    def collect(self) -> Iterator[Metric]:
        loss, miou, class_iou, requests = self._families()
        with self._lock:
            kept = [(run, name, mode) for run, modes in self._runs.items() for name, mode in modes.items()]
        since = time.monotonic() - SHOWN_SECONDS
        for run, name, mode in kept:
            if mode.heard < since:
                continue
            seen = mode.union > 0
            iou = mode.intersection[seen] / mode.union[seen]
            loss.add_metric([run, name], mode.loss)
            miou.add_metric([run, name], float(iou.mean()) if len(iou) else float("nan"))
            requests.add_metric([run, name], mode.requests)
            if len(seen) <= MAX_CLASSES_SHOWN:
                for number, value in zip(np.flatnonzero(seen), iou, strict=True):
                    class_iou.add_metric([run, name, str(number)], float(value))
        yield from (loss, miou, class_iou, requests)

    @staticmethod
    def _families() -> tuple[GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily, CounterMetricFamily]:
        labels = ["run", "mode"]
        return (
            GaugeMetricFamily(
                "lovasz_run_loss",
                "The last loss of a run, in training and evaluation. At most --max-runs runs are shown, each for as "
                "long as it is active; one that has been silent for a minute makes room for a new one.",
                labels=labels,
            ),
            GaugeMetricFamily(
                "lovasz_run_miou",
                "Mean IoU of about the last fifty requests of a run (each counts 0.98 times as much as the next), over "
                "the classes that are in them and not ignored.",
                labels=labels,
            ),
            GaugeMetricFamily(
                "lovasz_run_class_iou",
                f"IoU of each class in a run's last requests, for at most {MAX_CLASSES_SHOWN} classes.",
                labels=[*labels, "class"],
            ),
            CounterMetricFamily("lovasz_run_requests", "Requests (joint steps) of a run so far.", labels=labels),
        )
