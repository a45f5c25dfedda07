"""One rank of a process group in a child process: the joint loss without a server, and what to compare it with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from benchmarks.joint.rank import ANSWER_SECONDS
from benchmarks.workloads import HALF_TRAINED, Workload
from lovasz.client import Joint, LossClient
from lovasz.core import LovaszSoftmax, compute
from lovasz.core.backends.numba import bins
from lovasz.core.distributed import joint
from lovasz.core.distributed.group import Group

SERVER = "server, "
"""Before the name of a transport."""
KINDS = ("own losses", "all-reduce", "process group", "pixels", SERVER + "TCP", SERVER + "shared memory")
"""Each rank's own loss; an all-reduce of the tables of all classes alone; the joint loss as the ranks choose to compute
it; the joint loss where every rank gets the pixels of all; the joint loss of a server."""


class GroupRank:
    def __init__(self, store: str, targets: dict[str, str], workload: Workload, rank: int, ranks: int) -> None:
        """
        Args:
            store: a file by which the ranks meet.
            targets: of the server, by transport.
        """
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        self._place = rank, ranks
        ((self._logits, self._labels),) = workload.inputs(HALF_TRAINED, labels=torch.uint8)
        self._tables = torch.zeros(self._logits.shape[1], 2 * bins.BINS, dtype=torch.int64)
        self._tables_from = joint.TABLES_FROM_PIXELS
        self._clients = {name: LossClient(target, timeout=ANSWER_SECONDS) for name, target in targets.items()}
        self._steps = 0
        self._traffic = 0.0
        self._count_traffic()

    def step(self, kind: str) -> tuple[float, float, float]:
        """The start and the end of a step, instants of ``time.monotonic``, and the bytes that it sent and received.

        The ranks begin together.
        """
        joint.TABLES_FROM_PIXELS = 1 << 62 if kind == "pixels" else self._tables_from
        self._steps += 1
        distributed.barrier()
        self._traffic = 0.0
        start = time.monotonic()
        if kind == "all-reduce":
            distributed.all_reduce(self._tables)
            self._traffic = self._of_sum(self._tables.nbytes)
        elif kind.startswith(SERVER):
            self._ask(self._clients[kind.removeprefix(SERVER)])
        else:
            group = None if kind == "own losses" else "world"
            compute(self._logits, self._labels, LovaszSoftmax(), group=group)
        return start, time.monotonic(), self._traffic

    def _ask(self, client: LossClient) -> None:
        rank, ranks = self._place
        result = client.compute(
            self._logits, self._labels, LovaszSoftmax(), joint=Joint("group", rank, ranks, self._steps)
        )
        assert result.grad is not None
        self._traffic = self._logits.nbytes + self._labels.nbytes + result.grad.nbytes

    def _of_sum(self, nbytes: int) -> float:
        """The bytes that a rank sends and receives when the ranks add so many bytes of numbers."""
        ranks = self._place[1]
        return 4 * (ranks - 1) / ranks * nbytes

    def _of_all(self, nbytes: int) -> float:
        """The same when every rank gets so many bytes of each rank, which go from rank to rank."""
        return 2 * (self._place[1] - 1) * nbytes

    def _count_traffic(self) -> None:
        """Counts what the exchanges of a group send, apart from what the transport itself adds."""
        for name, nbytes in (
            ("add", lambda tensors: self._of_sum(sum(tensor.nbytes for tensor in tensors))),
            ("numbers", lambda own: self._of_all(own.nbytes)),
            ("bytes", lambda own: self._of_all(own.nbytes)),
        ):
            setattr(Group, name, self._counted(getattr(Group, name), nbytes))

    def _counted(self, exchange: Callable[..., Any], nbytes: Callable[[Any], float]) -> Callable[..., Any]:
        def counted(group: Group, given: Any) -> Any:
            self._traffic += nbytes(given)
            return exchange(group, given)

        return counted

    def close(self) -> None:
        for client in self._clients.values():
            client.close()
        distributed.destroy_process_group()
