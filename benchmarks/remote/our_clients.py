"""Clients of our server, in a child process of the form of :mod:`benchmarks.remote.inference_client`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.remote.load import CALL_SECONDS, Criterion, Load, apply_load
from benchmarks.workloads import Workload
from lovasz.client import LossClient, LovaszSoftmax


class OurClients:
    def __init__(self, target: str) -> None:
        torch.set_num_threads(1)
        self._target = target

    def load(self, workload: Workload, calls: int, untimed: int) -> Load:
        """See :func:`benchmarks.remote.load.apply_load`."""
        return apply_load(self._connect, workload, calls, untimed)

    @contextmanager
    def _connect(self) -> Iterator[Criterion]:
        with LossClient(self._target, transport="grpc", timeout=CALL_SECONDS) as client:
            yield lambda logits, labels: client.compute(logits, labels, LovaszSoftmax())
