"""Threads that stay warm: who gets the work, what waits, and how they end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from support.waiting import eventually

from lovasz.server.transport.lanes import Lanes
from lovasz.server.transport.threads import CallThreads
from lovasz.server.transport.warm_threads import WarmThreads


@pytest.fixture
def threads() -> Iterator[WarmThreads]:
    threads = WarmThreads(3, "warm")
    assert threads.is_full
    threads.start_all()
    yield threads
    threads.stop(wait=True)


def free(threads: WarmThreads, count: int) -> bool:
    return eventually(lambda: len(threads._idle) == count)


def test_work_goes_to_the_thread_that_was_busy_last(threads: WarmThreads) -> None:
    did: list[str] = []
    for turn in range(1, 6):
        threads.put(lambda: did.append(threading.current_thread().name))
        assert eventually(lambda turn=turn: len(did) == turn)
        assert free(threads, 3)
    assert did == ["warm_0"] * 5


def test_work_beyond_the_threads_waits_for_one(threads: WarmThreads) -> None:
    go_on, did = threading.Event(), threading.Semaphore(0)

    def work() -> None:
        go_on.wait(30)
        did.release()

    for _ in range(10):
        threads.put(work)
    assert threads.is_full
    assert not did.acquire(blocking=False)
    go_on.set()
    assert all(did.acquire(timeout=30) for _ in range(10))
    assert free(threads, 3)


def test_calls_have_futures() -> None:
    calls = CallThreads(2, Lanes())
    calls.start_all()
    assert not calls.is_full
    assert calls.submit(divmod, 7, 3).result(30) == (2, 1)
    with pytest.raises(ZeroDivisionError):
        calls.submit(divmod, 7, 0).result(30)
    calls.shutdown()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("call_")]


@pytest.mark.parametrize(
    "event", [SimpleNamespace(invocation_metadata=()), SimpleNamespace(invocation_metadata=7, call=7)]
)
def test_a_call_whose_connection_cannot_be_told_is_served(event: object) -> None:
    calls = CallThreads(1, Lanes())
    calls.start_all()
    assert calls.submit(lambda given: given, event).result(30) is event
    calls.shutdown()
