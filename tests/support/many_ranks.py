"""A process that makes the calls of many ranks of many runs at once; a test starts several, and kills some.

``python many_ranks.py TARGET ROUND`` reads lines ``RUN RANK SECONDS`` (when to send; negative: never). When its input
ends it says "there", sends each, and writes ``RUN RANK CODE LOSS GRADIENT-IN-HEX TEXT`` as each call ends.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import grpc
import numpy as np

from lovasz import wire
from lovasz.spec import LovaszSoftmax, weighted_sum
from lovasz.v1 import loss_pb2 as pb
from lovasz.v1 import loss_pb2_grpc

WORLD = 64
CLASSES = 3
LOSS = LovaszSoftmax()
PATIENCE_SECONDS = 60.0


def tensors(run: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(1000 * run + rank)
    return random.randn(1, CLASSES, 5).astype(np.float32), random.randint(0, CLASSES, (1, 5)).astype(np.uint8)


def request_of(logits: np.ndarray, labels: np.ndarray, joint: wire.Joint, want_grad: bool = True) -> pb.ComputeRequest:
    specs = (
        wire.TensorSpec(wire.dtype_named("float32"), logits.shape),
        wire.TensorSpec(wire.dtype_named("uint8"), labels.shape),
    )
    header = wire.Request.checked(weighted_sum(LOSS), *specs, want_grad, joint=joint).to_proto()
    return pb.ComputeRequest(header=header, logits=logits.tobytes(), labels=labels.tobytes())


def main(target: str, round_number: str) -> None:
    plan = sorted((float(seconds), int(run), int(rank)) for run, rank, seconds in map(str.split, sys.stdin))
    requests = {
        (run, rank): request_of(
            *tensors(run, rank), wire.Joint(f"{round_number}-{run}", 0, rank, WORLD, f"{run}-{rank}".encode())
        )
        for _, run, rank in plan
    }
    lock, left = threading.Lock(), threading.Semaphore(0)

    def report(run: int, rank: int, call: Any) -> None:
        loss, grad, text = 0.0, "-", ""
        if call.code() is grpc.StatusCode.OK:
            answer = call.result()
            loss, grad = answer.header.loss, answer.grad.hex()
        else:
            text = call.details()
        with lock:
            print(run, rank, call.code().name, repr(loss), grad, text, flush=True)
        left.release()

    with grpc.insecure_channel(target) as channel:
        grpc.channel_ready_future(channel).result(PATIENCE_SECONDS)
        stub = loss_pb2_grpc.LossServiceStub(channel)
        print("there", flush=True)
        since = time.monotonic()
        for seconds, run, rank in plan:
            if seconds < 0:
                continue
            time.sleep(max(0.0, since + seconds - time.monotonic()))
            call = stub.Compute.future(requests[run, rank], timeout=PATIENCE_SECONDS)
            call.add_done_callback(lambda ended, run=run, rank=rank: report(run, rank, ended))
        for seconds, _, _ in plan:
            if seconds >= 0:
                left.acquire()


if __name__ == "__main__":
    main(*sys.argv[1:])
