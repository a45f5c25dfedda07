"""A generator of small requests, in a child process: clients in threads that send as fast as they are answered."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial

import torch

from benchmarks.remote.client_internals import encoded, packet_bytes, payload
from benchmarks.remote.echo import raw_call
from benchmarks.remote.memory_echo import MemoryEchoPeer
from benchmarks.workloads import Regime, Workload
from lovasz.client import LossClient, LovaszSoftmax

GRPC, SHARED_MEMORY, MEMORY_ECHO = "grpc", "shm", "memory echo"
"""What sends, if not calls of a gRPC method: a ``LossClient`` of this transport, or a peer of the echo."""


class Generator:
    def __init__(self, workload: Workload, regime: Regime, threads: int) -> None:
        torch.set_num_threads(1)
        ((self._logits, self._labels),) = workload.inputs(regime)
        self._request = encoded(workload, regime)
        self._packet_bytes = packet_bytes(workload, regime)
        self._threads = threads
        self._callers: dict[tuple[str, str], list[Callable[[], object]]] = {}
        self._stack = ExitStack()
        self._pool = self._stack.enter_context(ThreadPoolExecutor(threads))

    def send(self, target: str, method: str, start: float, seconds: float) -> tuple[int, float]:
        """Sends from ``start`` on, an instant of ``time.perf_counter``, for ``seconds``.

        Args:
            method: of calls with ready bytes; or one of the three above.

        Returns:
            How many calls were made, and the instant when the last one ended.
        """
        if (target, method) not in self._callers:
            self._callers[target, method] = [self._caller(target, method) for _ in range(self._threads)]
        done = list(self._pool.map(partial(_send, start=start, seconds=seconds), self._callers[target, method]))
        return sum(count for count, _ in done), max(end for _, end in done)

    def close(self) -> None:
        self._stack.close()

    def _caller(self, target: str, method: str) -> Callable[[], object]:
        if method == MEMORY_ECHO:
            parts = payload(self._logits, self._labels)
            return self._stack.enter_context(
                closing(MemoryEchoPeer(target, parts, self._logits.nbytes, self._packet_bytes))
            )
        if method not in (GRPC, SHARED_MEMORY):
            return raw_call(target, method, self._request, self._stack)
        client = self._stack.enter_context(LossClient(target, transport=method))
        return lambda: client.compute(self._logits, self._labels, LovaszSoftmax())


def _send(call: Callable[[], object], start: float, seconds: float) -> tuple[int, float]:
    time.sleep(max(0.0, start - time.perf_counter()))
    count = 0
    while time.perf_counter() < start + seconds:
        call()
        count += 1
    return count, time.perf_counter()
