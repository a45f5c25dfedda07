"""Lanes: calls of a connection go on one after the other beside other connections, and never hold each other up."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
from support.waiting import eventually

from lovasz.server.schedule import contenders
from lovasz.server.transport import lanes as module
from lovasz.server.transport.lanes import Lanes, Place
from lovasz.server.transport.threads import CallThreads


class Traffic:
    """Calls that begin and end on demand, each named by its connection and a number."""

    def __init__(self, *connections: str) -> None:
        """These connections have sent requests."""
        self.lanes = Lanes()
        self.working: list[str] = []
        self._ends: dict[str, threading.Event] = {}
        self._threads = ThreadPoolExecutor(20)
        for connection in connections:
            with self.lanes.waited(Place(connection)):
                self.lanes.see()

    def begin(self, *calls: str, aside: threading.Event | None = None) -> None:
        """Each is worked on until :meth:`end`; first it waits for an event if there is one."""
        for call in calls:
            place, end = Place(call[:-1]), self._ends.setdefault(call, threading.Event())

            def serve(call: str = call, place: Place = place, end: threading.Event = end) -> None:
                with self.lanes.served(place):
                    if aside is not None:
                        with self.lanes.aside():
                            assert aside.wait(30)
                    self.working.append(call)
                    assert end.wait(30)
                    self.working.remove(call)

            self.lanes.begin(place, partial(self._threads.submit, serve))

    def end(self, call: str) -> None:
        self._ends[call].set()

    def are_working(self, *calls: str) -> bool:
        return eventually(lambda: sorted(self.working) == sorted(calls))

    def close(self) -> bool:
        """Whether all calls end, and no lane is left."""
        for end in self._ends.values():
            end.set()
        return eventually(lambda: not self.lanes._lanes and not self.working)


def test_calls_of_the_only_connection_go_on_at_once() -> None:
    traffic = Traffic("a")
    traffic.begin("a1", "a2", "a3")
    assert traffic.are_working("a1", "a2", "a3")
    assert traffic.close()


def test_beside_others_one_call_of_each_connection_is_worked_on() -> None:
    traffic = Traffic("a", "b")
    traffic.begin("a1", "a2", "a3", "b1")
    assert traffic.are_working("a1", "b1")
    traffic.end("a1")
    assert traffic.are_working("a2", "b1")
    traffic.end("a2")
    assert traffic.are_working("a3", "b1")
    assert traffic.close()


def test_almost_as_many_calls_go_on_as_the_connection_with_the_fewest_has() -> None:
    traffic = Traffic("a", "b")
    traffic.begin("a1", "a2", "a3", "b1", "b2")
    assert traffic.are_working("a1", "b1")  # The second call of b may have come before the first one is over.
    traffic.begin("b3")
    assert traffic.are_working("a1", "b1", "b2")
    traffic.begin("a4")
    assert traffic.are_working("a1", "a2", "b1", "b2")
    traffic.begin("b4", "b5")
    assert traffic.are_working("a1", "a2", "b1", "b2", "b3")
    traffic.lanes.check()
    assert traffic.are_working("a1", "a2", "a3", "b1", "b2", "b3")
    with traffic.lanes.waited(Place("c")):  # Another one comes, with one call at a time.
        traffic.lanes.see()
    traffic.begin("a5")
    for call in ("a1", "a2"):
        traffic.end(call)
    assert traffic.are_working("a3", "b1", "b2", "b3")
    traffic.end("a3")
    assert traffic.are_working("a4", "b1", "b2", "b3")
    assert traffic.close()


def test_beside_a_connection_of_weight_others_have_fewer_calls_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PEAK_SECONDS", 60.0)
    traffic = Traffic("a", "b")

    def see(weight: float) -> None:
        traffic.lanes._seen_until = 0.0
        with traffic.lanes.waited(Place("heavy")):
            traffic.lanes.see(weight)
            traffic.lanes.leave()

    calls = [f"{connection}{number}" for connection in "ab" for number in range(1, 10)]
    see(4.0)
    traffic.lanes._peaks["heavy"] = traffic.lanes._peaks["heavy"]._replace(calls=9)
    traffic.begin(*calls)
    traffic.lanes.check()
    assert traffic.are_working("a1", "a2", "b1", "b2")
    see(8.0)  # Its weight has changed.
    for call in ("a1", "a2", "b1", "b2"):
        traffic.end(call)
    assert traffic.are_working("a3", "b3")
    see(1.0)
    traffic.lanes.check()
    assert traffic.are_working(*(call for call in calls if call[1:] not in "12"))
    assert traffic.close()


def test_what_a_connection_had_at_once_counts_less_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    traffic = Traffic("a", "b")
    traffic.begin(*(f"b{number}" for number in range(8)), *(f"a{number}" for number in range(8)))
    assert traffic.lanes._width == 7
    for number in range(8):
        traffic.end(f"b{number}")
    assert eventually(lambda: "b" not in traffic.lanes._lanes)
    for seconds, width in ((0.9, 7), (0.2, 3), (1.0, 1), (9.0, 1)):
        now += seconds
        traffic.lanes.check()
        assert traffic.lanes._width == width
    traffic.begin("b8")
    assert traffic.lanes._width == 1
    assert traffic.close()


def test_a_connection_that_has_gone_narrows_no_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = Traffic("a", "b", "c")
    traffic.begin("a1", "a2", "a3", "b1", "b2", "b3")
    traffic.lanes.check()
    assert traffic.are_working("a1", "b1")
    traffic.lanes._contenders._seen.pop("c")
    traffic.lanes.check()
    assert traffic.are_working("a1", "a2", "b1", "b2")
    assert traffic.close()
    monkeypatch.setattr(contenders, "CONTENDED_SECONDS", -1.0)
    traffic.lanes.check()
    assert not traffic.lanes._peaks


def test_a_call_that_waits_for_something_lets_others_pass_and_goes_on_before_new_ones() -> None:
    traffic, come = Traffic("a", "b"), threading.Event()
    traffic.begin("a1", aside=come)
    traffic.begin("a2", "a3")
    assert traffic.are_working("a2")
    come.set()
    assert eventually(lambda: any(traffic.lanes._lanes["a"].waiting[module._Order.BEGUN]))
    assert traffic.are_working("a2")
    traffic.end("a2")
    assert traffic.are_working("a1")
    assert traffic.close()


def test_a_call_can_leave_its_lane_for_good() -> None:
    lanes, began = Traffic("a", "b").lanes, []
    with lanes.waited(Place("a")):
        lanes.begin(Place("a"), lambda: began.append(1))
        assert not began
        lanes.leave()
        assert began


def test_who_waits_goes_on_once_the_others_have_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = Traffic("a", "b")
    traffic.begin("a1", "a2", "a3")
    assert traffic.are_working("a1")
    traffic.lanes.check()
    assert traffic.are_working("a1")
    monkeypatch.setattr(contenders, "CONTENDED_SECONDS", -1.0)
    traffic.lanes.check()
    assert traffic.are_working("a1", "a2", "a3")
    assert traffic.close()


def test_a_call_that_takes_long_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    traffic = Traffic("a", "b")
    traffic.begin("a1", "a2", "a3")
    traffic.lanes.check()
    assert traffic.are_working("a1")
    monkeypatch.setattr(module, "_MOST_SECONDS", -1.0)
    traffic.lanes.check()
    assert traffic.are_working("a1", "a2")
    assert traffic.close()


def test_a_thread_without_a_call_waits_for_nobody() -> None:
    lanes = Lanes()
    with lanes.aside():
        lanes.see()
        lanes.leave()
    assert not lanes._lanes


def event(peer: str, **metadata: str) -> SimpleNamespace:
    """What gRPC submits with a call."""
    return SimpleNamespace(call=SimpleNamespace(peer=peer.encode), invocation_metadata=tuple(metadata.items()))


def test_calls_that_wait_in_their_lane_take_no_thread_but_count() -> None:
    traffic, go_on = Traffic("a", "b"), threading.Event()
    calls = CallThreads(3, traffic.lanes)
    calls.start_all()
    futures = [calls.submit(lambda _, number=n: go_on.wait(30) and number, event("a")) for n in range(3)]
    assert calls.is_full
    assert sum(map(len, traffic.lanes._lanes["a"].waiting)) == 2
    go_on.set()
    assert [future.result(30) for future in futures] == [0, 1, 2]
    assert eventually(lambda: not calls.is_full)
    calls.shutdown()
    assert traffic.close()


def test_clients_of_one_unix_socket_have_lanes_of_their_own() -> None:
    traffic, go_on = Traffic("a", "b"), threading.Event()
    calls = CallThreads(3, traffic.lanes)
    calls.start_all()
    for client in ("00" * 8, "11" * 8):
        calls.submit(lambda _: go_on.wait(30), event("unix:", **{"lovasz-client": client}))
    assert set(traffic.lanes._lanes) == {f"unix:client={'00' * 8}", f"unix:client={'11' * 8}"}
    go_on.set()
    calls.shutdown()
    assert traffic.close()
