"""A server that stops: the answers to what it accepted reach their callers, also those that take them slowly."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
from support.fork_server import ForkedServer
from support.http2 import Connection
from support.messages import request_of, tensors
from support.scrape import metric
from support.slow_path import SlowPath
from support.waiting import eventually

from lovasz.client import Joint, LossClient, LovaszSoftmax
from lovasz.server.launch import ServerProcess
from lovasz.v1 import loss_pb2 as pb

COMPUTE = "/lovasz.v1.LossService/Compute"
SOFTMAX = LovaszSoftmax()


def stop(server: ServerProcess, thread: ThreadPoolExecutor, answered: Callable[[], bool]) -> Future[int]:
    """Stops a server that has computed an answer; returns a while later."""
    assert eventually(answered)
    status = thread.submit(server.stop)
    assert eventually(lambda: any(line["event"] == "draining" for line in server.log))
    time.sleep(2.5)
    return status


@pytest.mark.parametrize(
    ("side", "before"),
    [(16, 0), (200, 1 << 17), (384, 1 << 17), (800, 1 << 17)],
    ids=["received, but not read", "one message", "stream", "more than the system holds"],
)
def test_an_answer_that_the_network_holds_up_arrives(side: int, before: int) -> None:
    """If it did not, a rank whose step is complete would wait for its peers elsewhere, in vain."""
    inputs = tensors(side)
    with ForkedServer(["--device", "cpu"]) as server, SlowPath(server.target) as path, ThreadPoolExecutor(1) as thread:
        with LossClient(server.target) as near, LossClient(path.target, transport="grpc") as client:
            near.compute(*tensors(8), SOFTMAX)
            expected = near.compute(*inputs, SOFTMAX)
            client.compute(*tensors(8), SOFTMAX)
            path.hold(after=before)
            call = client.submit(*inputs, SOFTMAX, timeout=30)
            status = stop(server, thread, lambda: metric(server, "lovasz_batch_requests_count") == 4)
            assert not status.done()
            path.go_on()
            answer = call.result()
        assert answer.loss == expected.loss
        assert np.array_equal(answer.grad, expected.grad)
        assert status.result() == 0
    assert server.log[-1]["unfinished_requests"] == 0


def test_an_answer_that_its_caller_takes_late_arrives() -> None:
    """The caller lets gRPC send less than the answer, so that nothing of the rest has left gRPC."""
    inputs = tensors(64)
    request = request_of(*inputs).SerializeToString()
    with ForkedServer(["--device", "cpu"]) as server, ThreadPoolExecutor(1) as thread:
        with LossClient(server.target) as client:
            expected = client.compute(*inputs, SOFTMAX)
        with Connection(server.target, window=1000) as connection:
            stream = connection.call(COMPUTE, request)
            status = stop(server, thread, lambda: len(connection.received[stream]) == 1000)
            assert not status.done()
            assert stream not in connection.ended
            for part in (0, stream):
                connection.take(part, 1 << 20)
            assert eventually(lambda: stream in connection.ended)
            answer = connection.received[stream]
        assert struct.unpack(">BI", answer[:5]) == (0, len(answer) - 5)
        answered = pb.ComputeResponse.FromString(bytes(answer[5:]))
        assert answered.header.loss == expected.loss
        assert answered.grad == expected.grad.tobytes()
        assert status.result() == 0


def test_a_rank_whose_answer_was_lost_gets_it_while_the_server_stops() -> None:
    """The other rank has its answer, and would not come again to another server."""
    inputs = [tensors(16), tensors(24)]
    joints = [Joint("lost", rank, 2, 0) for rank in range(2)]
    with (
        ForkedServer(["--device", "cpu"]) as server,
        SlowPath(server.target) as path,
        ThreadPoolExecutor(1) as thread,
        LossClient(server.target) as near,
        LossClient(path.target, transport="grpc") as far,
    ):
        far.compute(*tensors(8), SOFTMAX)
        path.hold(after=0)
        lost = far.submit(*inputs[1], SOFTMAX, joint=joints[1], timeout=20)
        answer = near.compute(*inputs[0], SOFTMAX, joint=joints[0])
        assert eventually(lambda: metric(server, "lovasz_in_flight_requests") == 0)
        status = thread.submit(server.stop)
        assert eventually(lambda: any(line["event"] == "draining" for line in server.log))
        path.cut()
        assert lost.result().loss == answer.loss
        assert status.result() == 0


@pytest.mark.parametrize("held_by", ["caller", "network", "nobody"])
def test_an_answer_that_does_not_arrive_in_time_is_counted_as_unfinished(held_by: str) -> None:
    request = request_of(*tensors(200)).SerializeToString()
    arguments = ["--device", "cpu", "--drain-seconds", "0.3"]
    window = 1000 if held_by == "caller" else 1 << 20
    with (
        ForkedServer(arguments) as server,
        SlowPath(server.target) as path,
        ThreadPoolExecutor(1) as thread,
        Connection(path.target, window) as connection,
    ):
        connection.take(0, 1 << 20)
        if held_by == "network":
            path.hold(after=1 << 17)
        connection.call(COMPUTE, request)
        status = stop(server, thread, lambda: metric(server, "lovasz_batch_requests_count") == 1)
        unfinished = 0 if held_by == "nobody" else 1
        assert status.result() == unfinished
    assert server.log[-1]["unfinished_requests"] == unfinished
