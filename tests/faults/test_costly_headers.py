"""Few bytes that would make much work: refused before the work, and what is said of them is short."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
from faults.conftest import BUDGET_BYTES
from support.audit import Audit
from support.messages import header_of, request_of, tensors

from lovasz import wire
from lovasz.client import LossClient, LovaszSoftmax, ServerOverloadedError
from lovasz.server.launch import ServerProcess
from lovasz.spec import MAX_CLASSES, MAX_TERMS, weighted_sum
from lovasz.v1 import loss_pb2 as pb
from lovasz.v1 import loss_pb2_grpc

MANY = 458_752


def processor_seconds(server: ServerProcess) -> float:
    """What the server has used of processors since its start."""
    fields = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def refusal_of(target: str, request: pb.ComputeRequest) -> tuple[grpc.StatusCode, str]:
    with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError) as refused:
        loss_pb2_grpc.LossServiceStub(channel).Compute(request, timeout=60)
    return refused.value.code(), refused.value.details()


def softmax(request: pb.ComputeRequest) -> pb.LovaszSoftmax:
    return request.header.loss.terms[0].lovasz_softmax


def _terms_with_weights(request: pb.ComputeRequest) -> None:
    term = request.header.loss.terms[0]
    term.lovasz_softmax.class_weights.extend([1.5] * (MANY // 7))
    request.header.loss.terms.extend([term] * 6)


LONG: dict[str, tuple[Callable[[pb.ComputeRequest], object], str]] = {
    "class weights": (lambda r: softmax(r).class_weights.extend([1.5] * MANY), f"class_weights: got {MANY} numbers"),
    "class weights of seven terms": (_terms_with_weights, f"class_weights: got {MANY // 7} numbers"),
    "classes": (lambda r: softmax(r).listed_classes.extend(range(MANY)), f"classes: got {MANY} numbers"),
    "offsets": (lambda r: r.header.offsets.extend(range(1, MANY)), f"offsets: got {MANY - 1}; expected at most 1"),
    "axes": (lambda r: r.header.labels.shape.extend([1] * MANY), "header: got 458"),
    "run": (lambda r: setattr(r.header, "run", "x" * 4_000_000), "header: got 4000"),
    "run of a step": (
        lambda r: r.header.joint.MergeFrom(pb.Joint(run="\x1b" * 4_000_000, world_size=1)),
        "header: got 4000",
    ),
    "unknown fields": (
        lambda r: r.header.MergeFromString(b"\xfa\x7f\x80\x89\x7a" + bytes(2_000_000)),
        "header: got 20",
    ),
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_header_is_refused_before_its_elements_are_read(
    besieged: ServerProcess, audit: Audit, name: str
) -> None:
    spoil, said = LONG[name]
    bad, good = request_of(*tensors(4)), request_of(*tensors(400))  # The good one has 3 MB, too.
    spoil(bad)
    with LossClient(besieged.target) as client:
        client.compute(*tensors(400), LovaszSoftmax())
    with grpc.insecure_channel(besieged.target) as channel:
        compute = loss_pb2_grpc.LossServiceStub(channel).Compute
        since = processor_seconds(besieged)
        for _ in range(5):
            compute(good, timeout=60)
        of_good = processor_seconds(besieged) - since
    logged, since = len(besieged.log), processor_seconds(besieged)
    for _ in range(5):
        code, text = refusal_of(besieged.target, bad)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert said in text
        assert len(text) < 2000
    assert processor_seconds(besieged) - since < 5 * of_good + 0.5
    assert sum(len(json.dumps(line)) for line in besieged.log[logged:]) < 20_000


def test_a_request_with_too_many_segments_is_refused_at_its_header(besieged: ServerProcess, audit: Audit) -> None:
    logits, labels = np.empty((224, MAX_CLASSES, 1), np.float16), np.empty((224, 1), np.int32)
    assert 2 * logits.nbytes + labels.nbytes < BUDGET_BYTES
    loss = weighted_sum([(1.0, LovaszSoftmax(classes="all", per_image=True))] * MAX_TERMS)
    header = header_of(logits, labels)
    header.loss.CopyFrom(wire.loss_to_proto(loss))
    with grpc.insecure_channel(besieged.target) as channel:
        stream = loss_pb2_grpc.LossServiceStub(channel).ComputeStream
        with pytest.raises(grpc.RpcError) as refused:
            list(stream(iter([pb.ComputeStreamRequest(header=header)]), timeout=60))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"{224 * MAX_CLASSES * MAX_TERMS} segments" in refused.value.details()
    assert "--max-segments" in refused.value.details()


def test_images_of_offsets_count_as_many_segments(besieged: ServerProcess, audit: Audit) -> None:
    """Each becomes a request of its own in the core: 400,000 would hold the device for many seconds."""
    points, loss = np.zeros((40_000, 2), np.float32), LovaszSoftmax(per_image=True)
    labels = np.zeros(len(points), np.uint8)
    with LossClient(besieged.target) as client:
        with pytest.raises(ServerOverloadedError, match=r"\(--max-segments\)") as refused:
            client.compute(points, labels, loss, offsets=np.arange(1, len(points) + 1))
        assert f"has {(2 + wire.IMAGE_SEGMENTS) * len(points)} segments" in str(refused.value)
        few = client.compute(points, labels, loss, offsets=np.arange(1, len(points) + 1).reshape(-1, 10)[:, -1])
        assert few.loss == pytest.approx(0.5)


def test_many_classes_with_weights_are_served(besieged: ServerProcess, audit: Audit) -> None:
    logits = np.random.RandomState(0).randn(2, 4096, 5).astype(np.float32)
    loss = LovaszSoftmax(class_weights=[1.0] * 4096)
    with LossClient(besieged.target) as client:
        result = client.compute(logits, np.zeros((2, 5), np.int32), loss)
        assert result.loss == client.compute(logits, np.zeros((2, 5), np.int32), LovaszSoftmax()).loss
