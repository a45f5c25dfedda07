"""What the service counts of calls, and logs of those that fail."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sized
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from support.clock import Clock
from support.desk import ABORTED, CANCELLED, OK, RESOURCE_EXHAUSTED, Desk, DeskCarrier, Outcome, Rank, ended
from support.waiting import eventually

from lovasz.server.observe.metrics import CLASSES, GAUGES, PHASES, Metrics
from lovasz.server.schedule import earmark
from lovasz.server.transport.call import SERVICE_NAME
from lovasz.server.transport.lanes import Lanes, Place
from lovasz.server.transport.status import CODES
from lovasz.wire import framing


def sample(desk: Desk, name: str, **labels: str) -> float | None:
    return desk.metrics.registry.get_sample_value(f"lovasz_{name}", labels)


def counted(desk: Desk) -> dict[str, float]:
    """How many requests came to each phase."""
    counts = {phase: sample(desk, "phase_seconds_count", phase=phase) for phase in PHASES}
    return {phase: count for phase, count in counts.items() if count}


def test_a_fault_is_counted_from_0_and_told_in_no_detail(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    assert sample(desk, "faults_total") == 0
    desk.engine.fault = RuntimeError("a secret")
    desk.compute()
    (outcome,) = ended(desk.ask(Rank(world_size=0)))
    assert outcome.code is grpc.StatusCode.INTERNAL
    assert "secret" not in outcome.text
    assert "a secret" in caplog.text
    assert sample(desk, "faults_total") == 1


def test_the_time_of_calls_that_were_given_up_counts_in_their_last_phase(desk: Desk) -> None:
    caller = DeskCarrier()
    call = desk.ask(Rank(world_size=0), caller)
    assert eventually(lambda: len(desk.batcher) == 1)
    caller.cancel()
    assert [outcome.code for outcome in ended(call)] == [CANCELLED]
    assert counted(desk) == {"receive": 1, "queue": 1}
    assert sample(desk, "request_seconds_count", outcome="failed") == 1


def test_the_time_of_a_call_that_was_given_up_while_it_was_computed_counts_as_computing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.compute()
    caller = DeskCarrier()
    entered, go_on = threading.Event(), threading.Event()
    start = desk.engine._start

    def held(*arguments: Any) -> Any:
        entered.set()
        go_on.wait(30)
        return start(*arguments)

    monkeypatch.setattr(desk.engine, "_start", held)
    call = desk.ask(Rank(world_size=0), caller)
    assert entered.wait(30)
    caller.cancel()
    go_on.set()
    assert [outcome.code for outcome in ended(call)] == [CANCELLED]
    assert counted(desk) == {"receive": 1, "queue": 1, "compute": 1}
    assert sample(desk, "abandoned_total", reason="cancelled", phase="compute") == 1


def _waiting(lanes: Lanes) -> Iterator[Sized]:
    return (queue for lane in list(lanes._lanes.values()) for queue in lane.waiting)


@pytest.mark.parametrize("pixels", [6, 1 << 18], ids=["small", "large"])
def test_small_calls_of_a_connection_wait_together_for_a_large_job_and_else_one_after_the_other(
    desk: Desk, pixels: int
) -> None:
    lanes = desk.service.pipeline.lanes
    for connection in ("a", "b"):
        with lanes.waited(Place(connection)):
            lanes.see()
    first = desk.ask(Rank(world_size=0, shape=(1, 3, pixels)))
    assert eventually(lambda: len(desk.batcher) == 1)

    def ask() -> Outcome:
        with lanes.waited(Place("a")):
            return desk._ask(Rank(world_size=0), DeskCarrier())

    calls = [desk._calls.submit(ask) for _ in range(3)]
    assert eventually(lambda: len(desk.batcher) + sum(map(len, _waiting(lanes))) == 4)
    assert len(desk.batcher) == (2 if pixels == 6 else 4)
    desk.compute()
    assert {outcome.code for outcome in ended(first, *calls)} == {OK}


def test_each_phase_of_a_slow_request_is_counted_apart_from_those_of_quick_ones(desk: Desk) -> None:
    desk.compute()
    ended(desk.ask(Rank(world_size=0)))
    quick, first = Rank(rank=0), desk.ask(Rank(rank=1))
    assert desk.waits_for(1)
    threading.Event().wait(1.1)
    ended(first, desk.ask(quick))
    assert 1.1 <= (sample(desk, "class_phase_seconds_total", over="1", phase="joint") or 0) < 10
    assert sample(desk, "class_phase_seconds_total", over="1", phase="receive") == pytest.approx(0, abs=0.1)
    assert sample(desk, "class_phase_seconds_total", over="10", phase="joint") == 0
    assert sample(desk, "request_seconds_count", outcome="answered") == 3
    assert sample(desk, "class_requests_total", over="1") == 1
    assert sum(sample(desk, "class_requests_total", over=over) or 0 for over in CLASSES) == 3
    by_class = [sample(desk, "class_phase_seconds_total", over=over, phase="joint") or 0 for over in CLASSES]
    assert sum(by_class) == pytest.approx(sample(desk, "phase_seconds_sum", phase="joint"))


def test_the_time_of_a_request_in_one_message_begins_with_its_call(desk: Desk) -> None:
    desk.compute()
    rank, carrier = Rank(world_size=0), DeskCarrier()

    def slowly() -> Iterator[framing.UnaryRequest]:
        threading.Event().wait(0.3)
        yield framing.UnaryRequest(rank.request.to_proto(), *rank.payload)

    details: Any = SimpleNamespace(method=f"/{SERVICE_NAME}/Compute", invocation_metadata=())
    method: Any = desk.service.handler().service(details)
    assert method.stream_unary(slowly(), carrier)
    carrier.end()
    assert (sample(desk, "phase_seconds_sum", phase="receive") or 0) > 0.25
    assert (sample(desk, "request_seconds_sum", outcome="answered") or 0) > 0.25


def test_what_was_refused_has_no_time_and_is_told_apart_by_what_it_lacked() -> None:
    desk = Desk(budget=2 * Rank().nbytes, max_requests=2)
    with desk.admission.reserve(desk.admission.budget_bytes):
        (outcome,) = ended(desk.ask(Rank(world_size=0)))
        assert outcome.code is RESOURCE_EXHAUSTED
    with desk.admission.reserve(0, 2):
        (outcome,) = ended(desk.ask(Rank(world_size=0)))
        assert outcome.code is RESOURCE_EXHAUSTED
    assert sample(desk, "rejections_total", reason="no_bytes") == 1
    assert sample(desk, "rejections_total", reason="no_requests") == 1
    assert counted(desk) == {}
    desk.close()


def test_a_caller_whose_request_is_refused_again_and_again_has_room_kept_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(earmark, "time", clock)
    small, large = Rank(world_size=0), Rank(world_size=0, shape=(1, 3, 60))
    desk = Desk(budget=large.nbytes + small.nbytes - 1)
    desk.compute()
    with desk.admission.reserve(small.nbytes):
        for _ in range(8):
            (outcome,) = ended(desk.ask(large, DeskCarrier(address="large")))
            assert outcome.code is RESOURCE_EXHAUSTED
            clock.now += 0.5
    (outcome,) = ended(desk.ask(small, DeskCarrier(address="small")))
    assert (outcome.code, "are kept for a request" in outcome.text) == (RESOURCE_EXHAUSTED, True)
    for rank in (large, small):
        (outcome,) = ended(desk.ask(rank, DeskCarrier(address="large")))
        assert outcome.code is OK
    desk.close()


def test_who_sent_what_can_never_fit_stands_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    desk = Desk(budget=10)
    (outcome,) = ended(desk.ask(Rank(world_size=1, run="large")))
    assert outcome.code is RESOURCE_EXHAUSTED
    (record,) = [vars(record) for record in caplog.records if record.message == "a request was refused"]
    assert (record["peer"], record["run"], record["loss"]) == ("desk", "large", "lovasz_softmax")
    assert "whole budget is 10 B" in record["reason"]
    desk.close()


def test_of_many_refused_requests_a_few_are_logged_and_the_others_counted(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    desk.compute()
    for _ in range(3):
        ended(desk.ask(Rank(world_size=0, label=9)))
    threading.Event().wait(1.1)
    ended(desk.ask(Rank(world_size=1, run="careless", label=9)))
    first, second = [vars(record) for record in caplog.records if record.message == "a request was refused"]
    assert (first["unlogged"], second["unlogged"], second["run"]) == (0, 2, "careless")
    assert "labels: got 9" in second["reason"]


def test_a_gauge_that_cannot_be_read_hides_no_other() -> None:
    def fail() -> float:
        raise RuntimeError("an illegal memory access")

    metrics = Metrics()
    metrics.watch({**dict.fromkeys(GAUGES, lambda: 1.0), "lovasz_device_memory_bytes": fail})
    assert math.isnan(metrics.registry.get_sample_value("lovasz_device_memory_bytes") or 0)
    assert metrics.registry.get_sample_value("lovasz_device_healthy") == 1


def test_every_code_is_counted_from_0(desk: Desk) -> None:
    for code in CODES:
        assert sample(desk, "requests_total", method="ComputeStream", loss="lovasz_hinge", code=code.name) == 0


def test_the_time_that_ranks_wait_in_vain_counts_as_waiting_for_others() -> None:
    desk = Desk(timeout=0.05)
    (outcome,) = ended(desk.ask(Rank(world_size=2)))
    assert outcome.code is ABORTED
    assert counted(desk) == {"receive": 1, "joint": 1}
    assert (sample(desk, "phase_seconds_sum", phase="joint") or 0) > 0
    desk.close()


def test_a_streamed_answer_is_watched_from_its_header_on(desk: Desk) -> None:
    """A caller may read nothing at all."""
    desk.compute()
    go_on, carrier = threading.Event(), DeskCarrier()
    go_on.set()
    answer = desk.stream(Rank(world_size=0), go_on, carrier)
    next(answer)
    assert len(desk.service.sending._answers) == 1
    list(answer)
