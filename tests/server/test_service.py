"""What the service counts of calls that fail."""

from __future__ import annotations

import grpc
import pytest
from footprint import eventually
from server.desk import ABORTED, CANCELLED, Caller, Desk, Rank, ended


def sample(desk: Desk, name: str, **labels: str) -> float | None:
    return desk.metrics.registry.get_sample_value(f"lovasz_{name}", labels)


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
    caller = Caller()
    call = desk.ask(Rank(world_size=0), caller)
    assert eventually(lambda: len(desk.batcher) == 1)
    caller.cancel()
    assert [outcome.code for outcome in ended(call)] == [CANCELLED]
    assert sample(desk, "phase_seconds_count", phase="queue") == 1
    assert sample(desk, "phase_seconds_count", phase="compute") == 0


def test_the_time_that_ranks_wait_in_vain_counts_as_waiting_for_others() -> None:
    desk = Desk(timeout=0.05)
    (outcome,) = ended(desk.ask(Rank(world_size=2)))
    assert outcome.code is ABORTED
    assert sample(desk, "phase_seconds_count", phase="joint") == 1
    assert (sample(desk, "phase_seconds_sum", phase="joint") or 0) > 0
    desk.close()
