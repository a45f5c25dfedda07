"""The load: real requests, and figures that agree with what the server counted."""

from __future__ import annotations

import math

import grpc
import numpy as np
import pytest
from support.scrape import metric
from support.scripted_server import Answer, abort, always, good_answer, serving
from support.waiting import eventually

from lovasz.client import InvalidInputError, LovaszSoftmax, ServerUnavailableError
from lovasz.client.bench.load import measure
from lovasz.client.bench.measurement import Phase, Progress
from lovasz.client.bench.workload import Workload
from lovasz.server.launch import ServerProcess
from lovasz.v1 import loss_pb2 as pb

SHAPE = (2, 3, 8, 8)
SOFTMAX = LovaszSoftmax()


@pytest.mark.parametrize("want_grad", [True, False])
def test_the_payload_is_what_travels(want_grad: bool) -> None:
    workload = Workload(SHAPE, SOFTMAX, want_grad=want_grad)
    with serving() as server:
        measurement = measure(server.target, workload, duration_seconds=0.1, warmup_seconds=0)
    gradient = 4 * math.prod(SHAPE) if want_grad else 0
    assert set(server.received_bytes) == {workload.payload_bytes - gradient}
    assert len(server.received_bytes) == measurement.requests + measurement.warmup_requests
    rate = measurement.requests / measurement.elapsed_seconds * workload.payload_bytes / 2**20
    assert measurement.mib_per_second == pytest.approx(rate)


def test_requests_are_those_that_the_server_counts(server: ServerProcess) -> None:
    def counted() -> float:
        return metric(server, "lovasz_requests_total", loss="lovasz_softmax", code="OK")

    before = counted()
    seen: list[Progress] = []
    workload = Workload((1, 3, 32, 32), SOFTMAX, concurrency=3)
    found = measure(server.target, workload, duration_seconds=0.4, warmup_seconds=0.2, watch=seen.append)
    # An answer is counted when it was sent, which its client need not have waited for.
    assert eventually(lambda: counted() - before >= found.requests + found.warmup_requests)
    assert counted() - before == found.requests + found.warmup_requests

    assert found.requests >= 3
    assert found.warmup_requests >= 4  # The first, and one of each client.
    assert (found.errors, found.failures, found.interrupted) == (0, (), False)
    assert found.requests_per_second == pytest.approx(found.requests / found.elapsed_seconds)
    assert 0 < found.latency_quantile(0.5) <= found.latency_quantile(0.99) <= found.latency_seconds.max()
    assert 1 <= found.mean_batch_requests <= 3
    split = found.split
    parts = (split.receive_seconds, split.queue_seconds, split.compute_seconds, split.copy_seconds, split.other_seconds)
    assert all(part >= 0 for part in parts[:3])
    assert sum(parts) == pytest.approx(np.median(found.latency_seconds))

    phases = [progress.phase for progress in seen]
    assert phases == sorted(phases, key=list(Phase).index)
    assert set(phases) == set(Phase)
    assert all(progress.errors == 0 for progress in seen)


def test_one_request_each_however_short_the_time() -> None:
    with serving() as server:
        workload = Workload(SHAPE, SOFTMAX, concurrency=4)
        found = measure(server.target, workload, duration_seconds=1e-9, warmup_seconds=0)
    assert (found.requests, found.warmup_requests) == (4, 1)


def test_failures_are_counted_by_kind() -> None:
    failed = {grpc.StatusCode.INTERNAL: 0, grpc.StatusCode.RESOURCE_EXHAUSTED: 0}

    def script(call: int, header: pb.RequestHeader, context: grpc.ServicerContext) -> Answer:
        if call % 3 == 2:
            return good_answer(header)
        code = list(failed)[call % 3]
        failed[code] += 1
        abort(context, code, f"call {call}", pushback_ms=-1)

    with serving(script) as server:
        found = measure(server.target, Workload(SHAPE, SOFTMAX), duration_seconds=0.3, warmup_seconds=0)
    counts = {failures.kind: failures.count for failures in found.failures}
    # The first request, which failed, is not measured.
    assert counts == {
        "ServerFaultError": failed[grpc.StatusCode.INTERNAL] - 1,
        "ServerOverloadedError": failed[grpc.StatusCode.RESOURCE_EXHAUSTED],
    }
    firsts = {failures.kind: failures.first for failures in found.failures}
    assert firsts["ServerOverloadedError"] == f"{server.target}: call 1 (RESOURCE_EXHAUSTED)"
    assert found.errors == sum(counts.values()) > 0
    assert found.requests == len(server.received_bytes) > 0
    assert found.warmup_requests == 1


def test_nothing_answered_has_no_figures() -> None:
    with serving(always(grpc.StatusCode.INTERNAL, "no")) as server:
        found = measure(server.target, Workload(SHAPE, SOFTMAX), duration_seconds=0.1, warmup_seconds=0)
    assert (found.requests, found.requests_per_second, found.mib_per_second) == (0, 0, 0)
    assert found.errors > 0
    assert math.isnan(found.latency_quantile(0.5))
    assert math.isnan(found.split.other_seconds)
    assert math.isnan(found.mean_batch_requests)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidInputError),
        (grpc.StatusCode.UNAVAILABLE, ServerUnavailableError),
    ],
)
def test_a_first_failure_that_would_not_go_away_ends_it(code: grpc.StatusCode, expected: type[Exception]) -> None:
    with serving(always(code, "logits: no")) as server:
        with pytest.raises(expected, match="logits: no"):
            measure(server.target, Workload(SHAPE, SOFTMAX, concurrency=2))
        assert server.methods == ["Compute"]


def test_a_client_that_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="timeout: got -1; expected seconds > 0"):
        measure("localhost:1", Workload(SHAPE, SOFTMAX), timeout_seconds=-1)
