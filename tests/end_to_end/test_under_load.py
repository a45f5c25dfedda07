"""Stops and restarts while many clients are at work."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from support.fork_server import ForkedServer
from support.messages import request_of, tensors
from support.scrape import metric
from support.waiting import eventually

from lovasz.client import LossClient, LovaszSoftmax
from lovasz.server.launch import ServerProcess
from lovasz.v1 import loss_pb2_grpc

CLIENTS = 16
STOPS = int(os.environ.get("STOPS", "3"))
SOFTMAX = LovaszSoftmax()


REQUESTS = [request_of(*tensors(side)) for side in (16, 64, 150)]


def test_sigterm_under_load_finishes_what_was_accepted_and_exits_0() -> None:
    for stop in range(STOPS):
        with ForkedServer(["--device", "cpu", "--drain-seconds", "20"]) as server:
            with grpc.insecure_channel(server.target) as channel:
                compute = loss_pb2_grpc.LossServiceStub(channel).Compute
                right = [compute(request).header.loss for request in REQUESTS]

            def client(number: int, target: str = server.target, right: list[float] = right) -> grpc.StatusCode:
                """Calls without retries until one is not answered."""
                choose = random.Random(number)
                options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
                with grpc.insecure_channel(target, options=options) as channel:
                    compute = loss_pb2_grpc.LossServiceStub(channel).Compute
                    while True:
                        which = choose.randrange(len(REQUESTS))
                        try:
                            answer = compute(REQUESTS[which], timeout=30)
                        except grpc.RpcError as error:
                            return error.code()
                        assert answer.header.loss == right[which]

            with ThreadPoolExecutor(CLIENTS) as pool:
                clients = [pool.submit(client, number) for number in range(CLIENTS)]
                time.sleep(0.3 + 0.1 * (stop % 5))
                assert not any(done.done() for done in clients)
                assert server.stop() == 0
                # CANCELLED: what came at the moment when gRPC closed, and was not accepted; clients try that again.
                refused = {done.result() for done in clients}
                assert refused <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        last = server.log[-1]
        assert (last["event"], last["unfinished_requests"]) == ("stopped", 0)


@pytest.mark.parametrize("end", [ServerProcess.kill, ServerProcess.stop], ids=["killed", "stopped"])
def test_no_step_is_lost_to_a_restart_under_load(end: Callable[[ServerProcess], object]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = ["--device", "cpu", "--listen", address]
    steps, ended = 40, threading.Event()
    logits = np.random.RandomState(0).randn(1, 4, 200, 200).astype(np.float32)
    labels = np.random.RandomState(0).randint(0, 4, (1, 200, 200)).astype(np.uint8)
    images = [logits, np.tile(logits, (6, 1, 1, 1))]  # A message, and a stream.

    def trainer(number: int) -> list[float]:
        mine = images[number % 2]
        losses = []
        with LossClient(address) as client:
            for step in range(steps):
                if step == steps // 2:
                    ended.wait(60)
                losses.append(client.compute(mine, np.tile(labels, (len(mine), 1, 1)), SOFTMAX).loss)
        return losses

    with ThreadPoolExecutor(8) as pool:
        with ForkedServer(arguments) as first:
            trainers = [pool.submit(trainer, number) for number in range(8)]
            assert eventually(lambda: metric(first, "lovasz_requests_total", code="OK") > 20)
            end(first)
        ended.set()
        with ForkedServer(arguments):
            losses = [done.result() for done in trainers]
    assert all(len(own) == steps and len(set(own)) == 1 for own in losses)
