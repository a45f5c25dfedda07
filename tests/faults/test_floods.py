"""One caller that asks for all there is, sends nothing, or takes nothing: the others are served, and it ends."""

from __future__ import annotations

import time

import grpc
import numpy as np
from faults.conftest import BUDGET_BYTES, HEADER_SECONDS, JOINT_SECONDS, MAX_REQUESTS
from support.audit import Audit
from support.footprint import Footprint
from support.http2 import Connection, message
from support.messages import header_of, request_of, tensors
from support.scrape import metric
from support.waiting import eventually

from lovasz import wire
from lovasz.server.launch import ServerProcess
from lovasz.v1 import loss_pb2 as pb
from lovasz.v1 import loss_pb2_grpc

COMPUTE = "/lovasz.v1.LossService/Compute"
STREAM = "/lovasz.v1.LossService/ComputeStream"
CHECK = "/grpc.health.v1.Health/Check"


def refusal_of(target: str, request: pb.ComputeRequest) -> tuple[grpc.StatusCode, str]:
    """How a call on a connection of its own fails."""
    with grpc.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            loss_pb2_grpc.LossServiceStub(channel).Compute(request, timeout=30)
        except grpc.RpcError as error:
            return error.code(), error.details()
    raise AssertionError("answered")


def joint_request(world_size: int, run: str) -> pb.ComputeRequest:
    return request_of(*tensors(4), joint=wire.Joint(run, 0, 0, world_size))


def test_a_step_of_many_ranks_does_not_hold_all_requests(besieged: ServerProcess, audit: Audit) -> None:
    code, text = refusal_of(besieged.target, joint_request(MAX_REQUESTS, "all"))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "--joint-share" in text
    half = MAX_REQUESTS // 2
    with Connection(besieged.target) as attacker:
        for run in range(4):
            attacker.call(COMPUTE, joint_request(half + 1, f"greedy {run}").SerializeToString())
        assert eventually(lambda: metric(besieged, "lovasz_in_flight_requests") == half + 1)
        for _ in range(5):
            audit.check_loss()
        # A run of another caller has room, too.
        code, text = refusal_of(besieged.target, joint_request(4, "honest"))
        assert (code, "ranks 1, 2, 3 of 4 did not arrive" in text) == (grpc.StatusCode.ABORTED, True)


def test_a_step_whose_only_rank_trickles_in_ends_at_the_timeout(besieged: ServerProcess, audit: Audit) -> None:
    logits, labels = tensors(700)  # 8 MB
    before = metric(besieged, "lovasz_joint_groups_total", outcome="timeout")
    header = header_of(logits, labels, joint=wire.Joint("trickle", 0, 0, 2))
    with Connection(besieged.target) as attacker:
        stream = attacker.open(STREAM)
        attacker.send(stream, message(pb.ComputeStreamRequest(header=header).SerializeToString()))
        assert eventually(lambda: metric(besieged, "lovasz_joint_groups_waiting") == 1)
        since, sent = time.monotonic(), 0
        while metric(besieged, "lovasz_joint_groups_waiting") and time.monotonic() < since + 10 * JOINT_SECONDS:
            # Fast enough for the payload's own time limit, also if a busy machine holds this up; but never all of it.
            part = min(0.9, 0.2 + (time.monotonic() - since) / 6)
            chunk = bytes(max(0, int(part * logits.nbytes) - sent))
            attacker.send(stream, message(pb.ComputeStreamRequest(chunk=chunk).SerializeToString()))
            sent += len(chunk)
            time.sleep(0.5)
    assert eventually(lambda: metric(besieged, "lovasz_joint_groups_total", outcome="timeout") == before + 1)


def test_calls_of_one_connection_beyond_its_share_are_told_when_to_try_again_and_others_are_served() -> None:
    request, own = request_of(*tensors(16)), [("grpc.use_local_subchannel_pool", 1)]
    with (
        ServerProcess(["--device", "cpu", "--max-requests", "128"]) as server,
        grpc.insecure_channel(server.target, options=own) as channel,
        grpc.insecure_channel(server.target, options=own) as other,
    ):
        service = loss_pb2_grpc.LossServiceStub(channel)
        for _ in range(8):
            calls = [service.Compute.future(request, timeout=60) for _ in range(200)]
            assert loss_pb2_grpc.LossServiceStub(other).Compute(request, timeout=60).header.loss > 0
            for call in calls:
                assert call.code() in (grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED), call.details()
                if call.code() is not grpc.StatusCode.OK:
                    assert wire.PUSHBACK_KEY in dict(call.trailing_metadata())


def test_who_declares_much_has_to_send_much(besieged: ServerProcess, audit: Audit) -> None:
    side = int((BUDGET_BYTES / 33) ** 0.5)
    logits, labels = np.empty((1, 4, side, side), np.float32), np.empty((1, side, side), np.uint8)
    before = metric(besieged, "lovasz_stalled_total", phase="receive")
    with Connection(besieged.target) as attacker:
        stream = attacker.open(STREAM)
        header = pb.ComputeStreamRequest(header=header_of(logits, labels)).SerializeToString()
        attacker.send(stream, message(header))
        assert eventually(lambda: metric(besieged, "lovasz_in_flight_bytes") > 0.9 * BUDGET_BYTES)
        for _ in range(30):  # A thousandth of the payload each time, and so in time for the stall timeout.
            chunk = pb.ComputeStreamRequest(chunk=bytes(80 << 10)).SerializeToString()
            if not attacker.send(stream, message(chunk)):
                break
            time.sleep(0.5)
        assert stream in attacker.ended
    assert metric(besieged, "lovasz_stalled_total", phase="receive") == before + 1


def test_calls_that_send_no_header_end_and_others_are_served(besieged: ServerProcess, audit: Audit) -> None:
    for method in (STREAM, COMPUTE, CHECK):
        connections = [Connection(besieged.target) for _ in range(4)]
        try:
            streams = [(attacker, attacker.open(method)) for attacker in connections for _ in range(100)]
            for _ in range(5):
                audit.check_health()
                audit.check_loss()
            assert eventually(lambda streams=streams: all(stream in one.ended for one, stream in streams))
        finally:
            for attacker in connections:
                attacker.__exit__(None, None, None)


def test_a_header_that_does_not_come_is_waited_for_some_seconds(besieged: ServerProcess, audit: Audit) -> None:
    with Connection(besieged.target) as attacker:
        streams, since = {attacker.open(COMPUTE), attacker.open(STREAM)}, time.monotonic()
        assert eventually(lambda: streams <= attacker.ended)
        assert time.monotonic() - since >= HEADER_SECONDS


def test_reflection_is_off(besieged: ServerProcess, audit: Audit) -> None:
    with Connection(besieged.target) as attacker:
        assert attacker.max_streams is not None
        assert attacker.max_streams <= max(MAX_REQUESTS, 128)
        stream = attacker.open("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        assert eventually(lambda: stream in attacker.ended)


def test_answers_that_nobody_takes_hold_their_room_and_are_cut_off(besieged: ServerProcess, audit: Audit) -> None:
    logits, labels = tensors(256)  # 1 MiB, and as much for its gradient
    request = request_of(logits, labels).SerializeToString()
    before = Footprint.of(besieged.pid).resident_bytes
    stalled = metric(besieged, "lovasz_stalled_total", phase="send")
    connections = [Connection(besieged.target, window=0) for _ in range(3)]
    most = 0
    try:
        for number in range(1000):
            attacker = connections[number % len(connections)]
            attacker.call(COMPUTE, request)
            if not number % 20:
                most = max(most, Footprint.of(besieged.pid).resident_bytes)
        assert eventually(lambda: metric(besieged, "lovasz_stalled_total", phase="send") > stalled)
        most = max(most, Footprint.of(besieged.pid).resident_bytes)
    finally:
        for attacker in connections:
            attacker.__exit__(None, None, None)
    assert most - before < 12 * BUDGET_BYTES  # Twice the budget, and what gRPC and the allocator keep; not 2,000 MiB.
