"""Asks :mod:`triton_server` for losses and times the calls, as many clients at once as wanted.

    .venv-triton/bin/python benchmarks/triton_client.py --url 127.0.0.1:8001 --shape 1x19x64x64 --clients 16

Prints one line of JSON: ``latencies_s``, the seconds of each call, a list a client; ``wall_s``, from the start of the
first call to the end of the last; ``loss``, the first client's. Inputs are those of :mod:`workloads`.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tritonclient.grpc import InferenceServerClient, InferInput
from workloads import REGIMES, Workload, regime_named

Logits = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]

MODEL = "lovasz"
CALL_SECONDS = 300.0
"""A call may take so long: behind 15 large ones of other clients, a minute or two."""


class TritonLoss:
    """The Lovász-Softmax loss of a Triton Inference Server, over a connection of its own.

    ``with TritonLoss("127.0.0.1:8001") as criterion: loss, grad = criterion(logits, labels)``
    """

    def __init__(self, url: str) -> None:
        """
        Args:
            url: host and port of its gRPC endpoint.
        """
        options = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            # Clients of one process would share a connection otherwise, which trainers in processes of theirs do not.
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self._client = InferenceServerClient(url, channel_args=options)

    def __call__(self, logits: Logits, labels: Labels) -> tuple[float, Logits]:
        """Loss and gradient in one call.

        Args:
            logits: float32, shape (N, C, H, W).
            labels: uint8, shape (N, H, W).
        """
        inputs = [InferInput("logits", logits.shape, "FP32"), InferInput("labels", labels.shape, "UINT8")]
        for tensor, array in zip(inputs, (logits, labels), strict=True):
            tensor.set_data_from_numpy(array)
        result = self._client.infer(MODEL, inputs, client_timeout=CALL_SECONDS)
        loss, grad = result.as_numpy("loss"), result.as_numpy("grad")
        return float(loss[0]), grad

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> TritonLoss:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def measured(url: str, workload: Workload, regime: str, requests: int, untimed: int) -> dict[str, Any]:
    """``workload.requests`` clients, each a thread that asks for its loss over and over, all at once.

    Args:
        requests: timed calls of each client.
        untimed: calls of each client before those.
    """
    pairs = workload.inputs(regime_named(regime), torch.device("cpu"))
    start_line = threading.Barrier(len(pairs), timeout=CALL_SECONDS)

    def client(logits: Logits, labels: Labels) -> tuple[list[tuple[float, float]], float]:
        with TritonLoss(url) as criterion:
            try:
                for _ in range(untimed):
                    criterion(logits, labels)
                start_line.wait()
            except BaseException:
                start_line.abort()  # nobody waits for who cannot come
                raise
            calls = []
            for _ in range(requests):
                start = time.perf_counter()
                loss, _ = criterion(logits, labels)
                calls.append((start, time.perf_counter()))
            return calls, loss

    with ThreadPoolExecutor(len(pairs)) as pool:
        arrays = [(logits.numpy(), labels.to(torch.uint8).numpy()) for logits, labels in pairs]
        answers = list(pool.map(client, *zip(*arrays, strict=True)))
    calls = [calls for calls, _ in answers]
    return {
        "latencies_s": [[end - start for start, end in own] for own in calls],
        "wall_s": max(own[-1][1] for own in calls) - min(own[0][0] for own in calls),
        "loss": answers[0][1],
    }


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(size) for size in text.split("x"))
    if len(shape) != 4 or min(shape) < 1 or shape[1] > 256:  # labels go as uint8
        raise ValueError
    return shape


def _count(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="host and port of the server's gRPC endpoint")
    parser.add_argument("--shape", type=_shape, required=True, metavar="NxCxHxW", help="of the logits of each request")
    parser.add_argument("--clients", type=_count, default=1)
    parser.add_argument("--requests", type=_count, default=10, help="timed calls of each client (default 10)")
    parser.add_argument("--untimed", type=int, default=1, help="calls of each client before those (default 1)")
    parser.add_argument("--regime", choices=[regime.name for regime in REGIMES], default="half-trained")
    args = parser.parse_args()
    workload = Workload(args.shape, requests=args.clients)
    print(json.dumps(measured(args.url, workload, args.regime, args.requests, args.untimed)))


if __name__ == "__main__":
    main()
