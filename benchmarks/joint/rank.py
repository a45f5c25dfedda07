"""One rank of a joint step, or the single request that holds all its tensors, in a child process."""

from __future__ import annotations

import time

import torch

from benchmarks.workloads import HALF_TRAINED, Workload
from lovasz.client import Joint, LossClient, LovaszSoftmax

ANSWER_SECONDS = 120.0


class Rank:
    def __init__(self, target: str, workload: Workload, rank: int | None, world_size: int) -> None:
        """
        Args:
            rank: None for the single request.
        """
        torch.set_num_threads(1)
        ((self._logits, self._labels),) = workload.inputs(HALF_TRAINED, labels=torch.uint8)
        self._rank, self._world_size = rank, world_size
        self._client = LossClient(target, timeout=ANSWER_SECONDS)

    def connect(self) -> None:
        """Sends one request alone, so that the first joint step need not wait for a rank that still starts."""
        self._client.compute(self._logits, self._labels, LovaszSoftmax())

    def step(self, number: int) -> tuple[float, float]:
        """The start and the end of a step, instants of ``time.monotonic``."""
        joint = None if self._rank is None else Joint("benchmark", self._rank, self._world_size, number)
        start = time.monotonic()
        self._client.compute(self._logits, self._labels, LovaszSoftmax(), joint=joint)
        return start, time.monotonic()

    def close(self) -> None:
        self._client.close()
