"""Load on a server by several clients of one process, the same for every server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.workloads import HALF_TRAINED, Workload

Logits = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]
Criterion = Callable[[Logits, Labels], Any]
"""One call: logits (N, C, H, W) and labels (N, H, W) to loss and gradient."""

CALL_SECONDS = 300.0
"""The longest that a call may take; behind 15 large ones of other clients it takes a minute or two."""


@dataclass(frozen=True)
class Load:
    """The load, and how long it took.

    Attributes:
        latencies: the seconds of each call; a list for each client.
        wall_seconds: from the start of the first call to the end of the last.
    """

    latencies: list[list[float]]
    wall_seconds: float

    @property
    def calls_per_second(self) -> float:
        return sum(map(len, self.latencies)) / self.wall_seconds


def apply_load(
    connect: Callable[[], AbstractContextManager[Criterion]], workload: Workload, calls: int, untimed: int
) -> Load:
    """Runs ``workload.requests`` clients at once, each a thread that makes its calls one after the other.

    Args:
        connect: opens the connection of a client.
        calls: timed calls of each client.
        untimed: calls of each client before those.
    """
    pairs = workload.inputs(HALF_TRAINED, labels=torch.uint8)
    start_line = threading.Barrier(len(pairs), timeout=CALL_SECONDS)

    def client(logits: Logits, labels: Labels) -> list[tuple[float, float]]:
        with connect() as criterion:
            try:
                for _ in range(untimed):
                    criterion(logits, labels)
                start_line.wait()
            except BaseException:
                start_line.abort()  # Or the others would wait for this one.
                raise
            spans = []
            for _ in range(calls):
                start = time.perf_counter()
                criterion(logits, labels)
                spans.append((start, time.perf_counter()))
            return spans

    with ThreadPoolExecutor(len(pairs)) as pool:
        spans = list(
            pool.map(client, *zip(*((logits.numpy(), labels.numpy()) for logits, labels in pairs), strict=True))
        )
    return Load(
        [[end - start for start, end in own] for own in spans],
        max(own[-1][1] for own in spans) - min(own[0][0] for own in spans),
    )
