"""One rank of a process group in a child process: the joint loss without a server, and what to compare it with."""

from __future__ import annotations

import os
import time

import torch
from torch import distributed

from benchmarks.workloads import HALF_TRAINED, Workload
from lovasz.core import LovaszSoftmax, compute
from lovasz.core.backends.numba import bins
from lovasz.core.distributed import joint

KINDS = ("own losses", "all-reduce", "process group", "pixels")
"""Each rank's own loss; an all-reduce of the tables of all classes alone; the joint loss as the ranks choose to compute
it; the joint loss where every rank gets the pixels of all."""


class GroupRank:
    def __init__(self, store: str, workload: Workload, rank: int, ranks: int) -> None:
        """
        Args:
            store: a file by which the ranks meet.
        """
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        ((self._logits, self._labels),) = workload.inputs(HALF_TRAINED, labels=torch.uint8)
        self._tables = torch.zeros(self._logits.shape[1], 2 * bins.BINS, dtype=torch.int64)
        self._tables_from = joint.TABLES_FROM_PIXELS

    def step(self, kind: str) -> tuple[float, float]:
        """The start and the end of a step, instants of ``time.monotonic``. The ranks begin together."""
        joint.TABLES_FROM_PIXELS = 1 << 62 if kind == "pixels" else self._tables_from
        distributed.barrier()
        start = time.monotonic()
        if kind == "all-reduce":
            distributed.all_reduce(self._tables)
        else:
            group = None if kind == "own losses" else "world"
            compute(self._logits, self._labels, LovaszSoftmax(), group=group)
        return start, time.monotonic()

    def close(self) -> None:
        distributed.destroy_process_group()
