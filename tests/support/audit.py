"""The audit: after an attack, a server is as it was before."""

from __future__ import annotations

import time

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.footprint import Footprint
from support.messages import LOSS, tensors
from support.scrape import metric
from support.waiting import eventually

from lovasz.client import LossClient
from lovasz.core import compute
from lovasz.server.launch import ServerProcess

MOST_MEMORY = 128 << 20
"""More memory than before may stay with the server, once it has given back what nobody uses (memory/allocator.py): at
most 60 MiB after all attacks, as measured."""
REST = {
    "lovasz_in_flight_bytes": 0,
    "lovasz_in_flight_requests": 0,
    "lovasz_queue_requests": 0,
    "lovasz_joint_groups_waiting": 0,
    "lovasz_joint_ranks_waiting": 0,
    "lovasz_joint_answers_kept": 0,
    "lovasz_shared_memory_sessions": 0,
    "lovasz_shared_memory_bytes": 0,
    "lovasz_device_healthy": 1,
}
"""What the metrics show of a server at rest."""


class Audit:
    """What a server is like at rest. :meth:`check` compares."""

    def __init__(self, server: ServerProcess, max_threads: int) -> None:
        """Asks for a known loss some times, and looks.

        Args:
            max_threads: that the server may have; it keeps threads that it has started.
        """
        self._server, self._max_threads = server, max_threads
        self._logits, self._labels = tensors(64)
        self._known = compute(self._logits, self._labels, LOSS)
        for _ in range(5):
            self.check_loss()
        self._before = Footprint.of(server.pid)
        self._faults = metric(server, "lovasz_faults_total")

    def check_loss(self) -> None:
        """The known loss, and its gradient, are right to the bit."""
        with LossClient(self._server.target, timeout=30) as client:
            result = client.compute(self._logits, self._labels, LOSS)
        assert np.float64(result.loss).tobytes() == np.float64(self._known.loss).tobytes()
        assert np.asarray(result.grad).tobytes() == np.asarray(self._known.grad).tobytes()

    def check_health(self) -> None:
        """The server says within some seconds, on a connection of its own, that it serves.

        In a flood of calls of health itself, a call may be refused: five tries, a second apart. Container engines have
        three, several seconds apart.
        """
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(self._server.target, options=options) as channel:
            for tries_left in reversed(range(5)):
                try:
                    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
                    break
                except grpc.RpcError as error:
                    if not tries_left or error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                        raise
                    time.sleep(1)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING

    def check(self) -> None:
        """Everything is back to the start."""
        self.check_health()
        self.check_loss()
        for name, value in REST.items():
            assert eventually(lambda name=name, value=value: metric(self._server, name) == value), name
        assert metric(self._server, "lovasz_faults_total") == self._faults
        before = self._before
        assert eventually(lambda: not Footprint.of(self._server.pid).descriptors - before.descriptors), (
            Footprint.of(self._server.pid).descriptors,
            before.descriptors,
        )
        most = before.resident_bytes + MOST_MEMORY
        assert eventually(lambda: Footprint.of(self._server.pid).resident_bytes <= most)
        after = Footprint.of(self._server.pid)
        assert after.threads <= max(before.threads, self._max_threads)
        assert eventually(lambda: Footprint.of(self._server.pid).shared_files <= before.shared_files)
