"""The table of errors: complete, with labels that the metrics declare."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from support.desk import Desk, Rank, ended

from lovasz.server import errors
from lovasz.server.observe.metrics import Abandonment, Rejection
from lovasz.server.transport.status import CODES, FAULT, STATUS, Status, status_of
from lovasz.spec import InvalidInput


def leaves(error: type[Exception]) -> Iterator[type[Exception]]:
    """The subclasses that are raised: those without subclasses of their own."""
    subclasses = error.__subclasses__()
    if not subclasses:
        yield error
    for subclass in subclasses:
        yield from leaves(subclass)


def test_every_error_has_a_row_and_every_row_an_error() -> None:
    ours = [error for error in leaves(errors.ServerError) if error.__module__ == errors.__name__]
    assert set(STATUS) == {InvalidInput, *ours}


def test_every_reason_is_that_of_some_error() -> None:
    assert {status.rejection for status in STATUS.values()} == {*Rejection, None}
    assert {status.abandonment for status in STATUS.values()} == {*Abandonment, None}


def test_what_is_no_error_of_the_server_is_a_fault() -> None:
    assert status_of(RuntimeError()) is FAULT
    assert FAULT not in STATUS.values()
    assert {grpc.StatusCode.OK, grpc.StatusCode.INTERNAL} < set(CODES)
    assert len(set(CODES)) == len(CODES)


def an_error(kind: type[BaseException]) -> BaseException:
    if kind is InvalidInput:
        return InvalidInput("labels", "no good")
    if issubclass(kind, errors.OverloadedError):
        return kind("no good", 1.5)
    return kind("no good")


@pytest.mark.parametrize(("kind", "status"), STATUS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_call_ends_as_its_row_says(
    kind: type[BaseException],
    status: Status,
    desk: Desk,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise an_error(kind)

    def count(name: str) -> dict[str, float]:
        """The series of a counter that are not 0, by their first label."""
        samples = [sample for family in desk.metrics.registry.collect() for sample in family.samples]
        found = [sample for sample in samples if sample.name == f"lovasz_{name}_total" and sample.value]
        return {next(iter(sample.labels.values()), ""): sample.value for sample in found}

    caplog.set_level("INFO")
    monkeypatch.setattr(desk.admission, "reserve", refuse)
    (outcome,) = ended(desk.ask(Rank(world_size=0)))
    assert outcome.code is status.code
    assert "no good" in outcome.text
    assert count("rejections") == ({status.rejection.value: 1} if status.rejection else {})
    assert count("abandoned") == ({status.abandonment.value: 1} if status.abandonment else {})
    assert count("stalled") == ({"receive": 1} if status.stalled else {})
    assert ("a request was refused" in caplog.messages) is status.logged
    retry = getattr(an_error(kind), "retry_after_seconds", None)
    assert outcome.metadata == ({} if retry is None else {"grpc-retry-pushback-ms": str(round(retry * 1000))})
