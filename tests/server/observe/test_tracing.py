"""The trace of a call: from its metadata to the exemplars of the metrics and to the log."""

from __future__ import annotations

from typing import cast

import grpc
import pytest
from support.desk import OK, Desk, DeskCarrier, Rank, ended

from lovasz.server.observe.tracing import exemplar

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize("value", [SAMPLED, f"00-{TRACE}-{SPAN}-03", f"01-{TRACE}-{SPAN}-01-more"])
def test_a_recorded_trace_is_named(value: str) -> None:
    assert exemplar([("user-agent", "x"), ("traceparent", value)]) == {"trace_id": TRACE, "span_id": SPAN}


@pytest.mark.parametrize(
    "value",
    [
        f"00-{TRACE}-{SPAN}-00",
        f"00-{TRACE}-{SPAN}-02",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}",
        SAMPLED + "x",
        SAMPLED + "-more",
        "",
        b"00",
    ],
)
def test_what_is_no_trace_or_not_recorded_is_passed_over(value: str | bytes) -> None:
    assert exemplar([("traceparent", value)]) is None
    assert exemplar([]) is None


def test_each_phase_of_a_traced_request_has_it_as_its_exemplar(desk: Desk) -> None:
    desk.compute()
    traced = DeskCarrier(metadata=(("traceparent", SAMPLED),))
    (outcome,) = ended(desk.ask(Rank(world_size=0), traced))
    assert outcome.code is OK
    (phases,) = [one for one in desk.metrics.registry.collect() if one.name == "lovasz_phase_seconds"]
    shown = {sample.labels["phase"]: sample.exemplar.labels for sample in phases.samples if sample.exemplar}
    assert shown.keys() == {"receive", "queue", "compute", "copy", "send"}
    assert all(labels == {"trace_id": TRACE, "span_id": SPAN} for labels in shown.values())


def test_a_fault_is_logged_with_its_trace(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    desk.compute()
    desk.engine.fault = RuntimeError("a kernel failed")
    (outcome,) = ended(desk.ask(Rank(world_size=0), DeskCarrier(metadata=(("traceparent", SAMPLED),))))
    assert outcome.code is grpc.StatusCode.INTERNAL
    (record,) = [record for record in caplog.records if record.message == "unexpected fault"]
    assert cast("dict[str, str]", vars(record))["trace_id"] == TRACE
