"""Those who watch health: each is told of a change, and none holds up the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2
from support.waiting import eventually

from lovasz.server.transport import watchers as module
from lovasz.server.transport.watchers import Watchers

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Caller:
    """A caller and its call: as gRPC does, it takes a status once it may, or when the call has ended.

    Attributes:
        told: what it was told; None at the end.
        goes_on: clear while it does not read.
    """

    def __init__(self, watchers: Watchers) -> None:
        self.told: list[int | None] = []
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.before_send: Callable[[], object] = lambda: None
        self._ends: list[Callable[[], None]] | None = []
        self._watchers = watchers

    def add_callback(self, callback: Callable[[], None]) -> bool:
        if self._ends is None:
            return False
        self._ends.append(callback)
        return True

    def cancel(self) -> None:
        ends, self._ends = self._ends, None
        self.goes_on.set()
        for end in ends or ():
            end()

    def abort(self, code: grpc.StatusCode, text: str) -> None:
        raise RuntimeError(code.name, text)

    def send(self, response: Any) -> None:
        self.before_send()
        self.told.append(None if response is None else response.status)
        if response is not None:
            assert self.goes_on.wait(30)

    def watch(self, service: str = "") -> Caller:
        self._watchers.add(service, cast(grpc.ServicerContext, self), self.send)
        return self


@pytest.fixture
def status() -> dict[str, int]:
    return {"": SERVING}


@pytest.fixture
def watchers(status: dict[str, int]) -> Iterator[Watchers]:
    watchers = Watchers(lambda name: status.get(name, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN))
    watchers.start_threads()
    yield watchers
    watchers.end_threads(wait=True)


def test_a_caller_is_told_each_change_until_it_goes(watchers: Watchers, status: dict[str, int]) -> None:
    caller, other = Caller(watchers).watch(), Caller(watchers).watch("other")
    assert eventually(lambda: caller.told == [SERVING])
    watchers.tell()
    status[""] = NOT_SERVING
    watchers.tell()
    assert eventually(lambda: caller.told == [SERVING, NOT_SERVING])
    assert other.told == [health_pb2.HealthCheckResponse.SERVICE_UNKNOWN]
    caller.cancel()
    status[""] = SERVING
    watchers.tell()
    assert caller.told == [SERVING, NOT_SERVING, None]
    assert len(watchers) == 1


def test_a_caller_that_has_gone_already_is_not_kept(watchers: Watchers) -> None:
    caller = Caller(watchers)
    caller.cancel()
    caller.watch()
    assert caller.told == [None]
    assert len(watchers) == 0


def test_callers_that_do_not_read_hold_up_nobody_for_long(
    watchers: Watchers, status: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy = [Caller(watchers) for _ in range(6)]
    for caller in lazy:
        caller.goes_on.clear()
        caller.watch()
    good = Caller(watchers).watch()
    assert eventually(lambda: sum(map(len, (caller.told for caller in lazy))) == 4)
    watchers.check()
    assert len(watchers) == 7
    monkeypatch.setattr(module, "STALL_SECONDS", 0.2)

    def is_told() -> bool:
        watchers.check()
        return good.told == [SERVING]

    assert eventually(is_told)
    assert eventually(lambda: len(watchers) == 1 or not is_told())
    status[""] = NOT_SERVING
    watchers.tell()
    assert eventually(lambda: good.told == [SERVING, NOT_SERVING])


def test_a_caller_may_go_while_another_is_told(watchers: Watchers, status: dict[str, int]) -> None:
    going, caller = Caller(watchers).watch(), Caller(watchers)
    assert eventually(lambda: going.told == [SERVING])
    caller.before_send = going.cancel
    caller.watch()
    assert eventually(lambda: caller.told == [SERVING])
    assert going.told == [SERVING, None]


def test_what_changes_while_it_is_told_is_told_next(watchers: Watchers, status: dict[str, int]) -> None:
    caller = Caller(watchers)
    caller.goes_on.clear()
    caller.watch()
    assert eventually(lambda: caller.told == [SERVING])
    status[""] = NOT_SERVING
    watchers.tell()
    caller.goes_on.set()
    assert eventually(lambda: caller.told == [SERVING, NOT_SERVING])


def test_the_number_of_those_who_watch_is_bounded(watchers: Watchers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WATCHERS", 3)
    first, *others = [Caller(watchers).watch() for _ in range(3)]
    with pytest.raises(RuntimeError, match=r"RESOURCE_EXHAUSTED.*3 callers watch health, the maximum"):
        Caller(watchers).watch()
    assert len(watchers) == 3
    first.cancel()
    late = Caller(watchers).watch()
    assert eventually(lambda: all(caller.told == [SERVING] for caller in (*others, late)))
