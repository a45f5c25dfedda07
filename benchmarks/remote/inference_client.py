"""Clients of an :class:`~benchmarks.remote.inference_server.InferenceServer`, in a child process.

Runs in the environment of ``inference_server.txt``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tritonclient.grpc import InferenceServerClient, InferInput

from benchmarks.remote.load import CALL_SECONDS, Criterion, Labels, Load, Logits, apply_load
from benchmarks.workloads import Workload

MODEL = "lovasz"
OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Otherwise all clients of a process share one connection; trainers in processes of their own do not.
    ("grpc.use_local_subchannel_pool", 1),
]


@contextmanager
def connect(target: str) -> Iterator[Criterion]:
    """Opens a connection of its own to host and port of the server's gRPC endpoint."""
    client = InferenceServerClient(target, channel_args=OPTIONS)

    def criterion(logits: Logits, labels: Labels) -> tuple[float, Logits]:
        inputs = [InferInput("logits", logits.shape, "FP32"), InferInput("labels", labels.shape, "UINT8")]
        for tensor, array in zip(inputs, (logits, labels), strict=True):
            tensor.set_data_from_numpy(array)
        result = client.infer(MODEL, inputs, client_timeout=CALL_SECONDS)
        loss, grad = result.as_numpy("loss"), result.as_numpy("grad")
        return float(loss[0]), grad

    try:
        yield criterion
    finally:
        client.close()


class InferenceClients:
    def __init__(self, target: str) -> None:
        torch.set_num_threads(1)
        self._target = target

    def load(self, workload: Workload, calls: int, untimed: int) -> Load:
        """See :func:`benchmarks.remote.load.apply_load`."""
        return apply_load(lambda: connect(self._target), workload, calls, untimed)
