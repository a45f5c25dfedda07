"""A stranger that knows run, step and rank: the ranks of the training get their answers, and it is refused alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import grpc
import numpy as np
import pytest
from support.audit import Audit
from support.messages import LOSS, request_of, tensors
from support.scrape import metric
from support.waiting import eventually

from lovasz import wire
from lovasz.client import Joint, LossClient, Result
from lovasz.core import compute
from lovasz.server.launch import ServerProcess
from lovasz.v1 import loss_pb2 as pb
from lovasz.v1 import loss_pb2_grpc

SECRET, OTHER = b"known to the ranks", b"known to another"
STEPS = 3


def steps_of(target: str, run: str, secret: bytes, rank: int) -> list[Result]:
    """What a rank gets in some steps."""
    with LossClient(target, timeout=30) as client:
        joints = [Joint(run, rank, 2, step, secret=secret) for step in range(STEPS)]
        results = [client.compute(*tensors(20 + rank), LOSS, joint=joint) for joint in joints]
        client.leave(Joint(run, rank, 2, STEPS, secret=secret), 0)  # Else the server keeps the last answer for a while.
        return results


def check_answers(answers: list[list[Result]]) -> None:
    """They are those of one request that holds the pixels of both ranks, to the bit."""
    flat = [(logits.reshape(4, -1).T, labels.reshape(-1)) for logits, labels in map(tensors, (20, 21))]
    whole = compute(*(np.concatenate(arrays) for arrays in zip(*flat, strict=True)), LOSS)
    first, second = np.split(np.asarray(whole.grad), [20 * 20])
    for rank, grad in enumerate((first, second)):
        for result in answers[rank]:
            assert result.loss == whole.loss
            assert np.array_equal(np.asarray(result.grad).reshape(4, -1).T, grad)


def in_a_ranks_place(run: str, secret: bytes) -> Iterator[pb.ComputeRequest]:
    """Requests of a stranger, one for each step."""
    for step in range(STEPS):
        yield request_of(*tensors(30), joint=wire.Joint(run, step, 1, 2, secret=secret))


def misfits(run: str, secret: bytes) -> Iterator[pb.ComputeRequest]:
    """Requests of a stranger that fit nobody."""
    for step in range(STEPS):
        yield request_of(*tensors(4), joint=wire.Joint(run, step, 0, 3, secret=secret))
        never_fits = request_of(*tensors(4), joint=wire.Joint(run, step, 0, 2, secret=secret))
        never_fits.header.logits.shape[2] = never_fits.header.labels.shape[1] = 1 << 40
        yield never_fits


@pytest.mark.parametrize("secret", [b"", OTHER], ids=["no secret", "another secret"])
def test_a_stranger_changes_nothing(besieged: ServerProcess, audit: Audit, secret: bytes) -> None:
    run = f"attacked {len(secret)}"
    with grpc.insecure_channel(besieged.target) as channel, ThreadPoolExecutor(4) as threads:
        stub = loss_pb2_grpc.LossServiceStub(channel)

        def attack(step: int) -> list[grpc.StatusCode]:
            place = wire.Joint(run, step, 1, 2, secret=secret)
            abort = stub.AbortStep.future(wire.Abort(place, True, "no").to_proto(), timeout=30)
            leave = stub.LeaveRun.future(wire.Leave(place, 0).to_proto(), timeout=30)
            return [abort.code(), leave.code()]

        # It comes first.
        strangers = [stub.Compute.future(request, timeout=30) for request in in_a_ranks_place(run, secret)]
        assert eventually(lambda: metric(besieged, "lovasz_joint_groups_waiting") == STEPS)
        strangers += [stub.Compute.future(request, timeout=30) for request in misfits(run, secret)]
        said = attack(0)
        honest = [threads.submit(steps_of, besieged.target, run, SECRET, rank) for rank in range(2)]
        # And it comes again and again.
        while not all(one.done() for one in honest):
            said += attack(STEPS - 1)
        check_answers([one.result(60) for one in honest])
        assert grpc.StatusCode.OK not in {call.code() for call in strangers}
    if not secret:
        assert grpc.StatusCode.FAILED_PRECONDITION in said
        assert metric(besieged, "lovasz_rejections_total", reason="conflict") > 0
    assert SECRET.decode() not in str(besieged.log)


def test_two_trainings_of_one_name_get_their_own_losses_and_are_told(
    besieged: ServerProcess, audit: Audit, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "lovasz.client")
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(4))
        calls = [
            [threads.submit(steps_of, besieged.target, "same name", secret, rank) for rank in range(2)]
            for secret in (SECRET, OTHER)
        ]
        for training in calls:
            check_answers([one.result(60) for one in training])
    assert "has a run of the name 'same name', too" in caplog.text
