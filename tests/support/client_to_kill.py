"""A client that comes to a phase of a call, prints "there", and waits to be killed. It imports no torch, to start fast.

``python -m support.client_to_kill PHASE TARGET``
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import grpc
import numpy as np
from support.messages import LOSS, messages_of, tensors

from lovasz.client import LossClient
from lovasz.v1 import loss_pb2 as pb
from lovasz.v1 import loss_pb2_grpc

MESSAGES_SENT = {"header": 1, "payload": 8, "result": None}
"""How many messages of the stream are sent in each phase; None: all."""

LARGE = np.zeros((1, 19, 2000, 2000), np.float32), np.zeros((1, 2000, 2000), np.uint8)
"""Logits and labels that take a while to send and to compute."""

_never = threading.Event()


def main(phase: str, target: str) -> None:
    if phase in MESSAGES_SENT:
        call = loss_pb2_grpc.LossServiceStub(grpc.insecure_channel(target)).ComputeStream(_first(MESSAGES_SENT[phase]))
        if phase == "result":
            next(call)
        print("there", flush=True)
        _never.wait(60)
    client = LossClient(target, timeout=60)
    if phase == "holding":
        held = client.compute(*tensors(1000), LOSS)
        print("there", flush=True)
        _never.wait(60)
        del held
    print("there", flush=True)
    client.compute(*LARGE, LOSS)


def _first(count: int | None) -> Iterator[pb.ComputeStreamRequest]:
    yield from messages_of(*tensors(1000))[:count]
    if count:
        _never.wait(60)


if __name__ == "__main__":
    main(*sys.argv[1:])
