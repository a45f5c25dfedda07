"""Admission: bytes and requests, counted and given back."""

from __future__ import annotations

import random
import threading

import pytest
from support.clock import Clock

from lovasz.server.errors import (
    NameLimitError,
    OverloadedError,
    ServerError,
    StartingError,
    StoppingError,
    TooLargeError,
)
from lovasz.server.schedule import earmark
from lovasz.server.schedule.admission import Admission


def test_room_is_taken_and_given_back_once() -> None:
    admission = Admission(100, 10)
    permit = admission.reserve(60)
    assert (admission.bytes_in_flight, admission.requests_in_flight) == (60, 1)
    permit.release()
    permit.release()
    assert (admission.bytes_in_flight, admission.requests_in_flight) == (0, 0)


def test_over_budget_is_refused_with_a_delay_and_takes_nothing() -> None:
    admission = Admission(100, 10)
    with admission.reserve(60):
        with pytest.raises(OverloadedError, match="41 B are needed; 60 B of 100 B are in use") as refused:
            admission.reserve(41)
        assert 0 < refused.value.retry_after_seconds <= 5
        assert admission.bytes_in_flight == 60
        admission.reserve(40).release()
    admission.reserve(41).release()


def test_what_can_never_fit_is_told_so() -> None:
    with pytest.raises(TooLargeError, match=r"take 1 KiB .* whole budget is 100 B"):
        Admission(100, 10).reserve(1024)


def test_requests_are_counted_too() -> None:
    admission = Admission(100, 2)
    with admission.reserve(1), admission.reserve(1), pytest.raises(OverloadedError, match="2 requests are in flight"):
        admission.reserve(1)


def test_closed_admits_nothing_and_takes_back_what_is_out() -> None:
    admission = Admission(100, 2)
    permit = admission.reserve(10)
    admission.close()
    with pytest.raises(StoppingError):
        admission.reserve(1)
    permit.release()
    assert admission.bytes_in_flight == 0


def test_many_threads_leave_nothing_behind_and_never_exceed_the_budget() -> None:
    admission = Admission(1000, 8)
    exceeded = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(500):
            try:
                permit = admission.reserve(rng.randint(1, 400))
            except ServerError:
                continue
            if admission.bytes_in_flight > 1000 or admission.requests_in_flight > 8:
                exceeded.append(seed)
            permit.release()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not exceeded
    assert (admission.bytes_in_flight, admission.requests_in_flight) == (0, 0)


def test_waiting_until_all_is_given_back() -> None:
    admission = Admission(100, 2)
    assert admission.wait_until_empty(0) == 0
    permit = admission.reserve(10)
    assert admission.wait_until_empty(0) == 1
    threading.Timer(0.05, permit.release).start()
    assert admission.wait_until_empty(30) == 0


def test_the_most_bytes_at_a_time_are_known() -> None:
    admission = Admission(100, 3)
    assert admission.take_peak_bytes() == 0
    with admission.reserve(10), admission.reserve(30):
        pass
    kept = admission.reserve(20)
    assert admission.take_peak_bytes() == 40
    assert admission.take_peak_bytes() == 20
    kept.release()
    assert admission.take_peak_bytes() == 20
    assert admission.take_peak_bytes() == 0


def test_nothing_is_admitted_before_the_device_is_ready() -> None:
    admission = Admission(100, 2)
    admission.starting = True
    with pytest.raises(StartingError, match=r"is starting: it compiles, a minute or two") as refused:
        admission.reserve(10)
    assert refused.value.retry_after_seconds == 1.0
    admission.starting = False
    with admission.reserve(10):
        assert admission.requests_in_flight == 1


def of_alice(name: str) -> float:
    return 0.5 if name == "alice" else 1.0


def test_a_name_holds_no_more_than_its_share_and_leaves_the_rest_to_others() -> None:
    admission = Admission(100, 4, of_alice)
    with admission.reserve(30, name="alice") as held:
        with pytest.raises(
            NameLimitError,
            match=r"21 B are needed; the requests of alice hold 30 B of at most 50 B \(budget=0.5 of --memory-budget\)",
        ) as refused:
            admission.reserve(21, name="alice")
        assert 0 < refused.value.retry_after_seconds <= 5
        with pytest.raises(NameLimitError):
            held.resize(51)
        with admission.reserve(20, name="alice"):
            with pytest.raises(
                NameLimitError, match=r"2 requests of alice are in flight, of at most 2 \(budget=0.5 of"
            ):
                admission.reserve(0, name="alice")
            admission.reserve(50, name="bob").release()
            admission.reserve(50).release()
    admission.reserve(50, 2, name="alice").release()
    assert (admission.bytes_in_flight, admission.requests_in_flight) == (0, 0)
    assert not admission._bytes_of
    assert not admission._requests_of


def test_what_never_fits_into_the_share_of_a_name_is_told_so() -> None:
    admission = Admission(100, 4, of_alice)
    with pytest.raises(TooLargeError, match=r"requests of alice may hold 50 B at a time \(budget=0.5 of"):
        admission.reserve(51, name="alice")
    with pytest.raises(TooLargeError, match=r"alice may have 2 at a time \(budget=0.5 of --max-requests\)"):
        admission.reserve(1, 3, name="alice")


def test_every_name_may_have_one_request() -> None:
    Admission(100, 4, lambda name: 0.1).reserve(1, name="alice").release()


def test_parts_of_a_permit_count_for_its_name() -> None:
    admission = Admission(100, 4, of_alice)
    permit = admission.reserve(50, 2, name="alice")
    part = permit.split(20)
    permit.release()
    admission.reserve(30, name="alice").release()
    with pytest.raises(NameLimitError):
        admission.reserve(31, name="alice")
    part.release()
    assert not admission._bytes_of


def test_a_full_share_reclaims_what_its_name_keeps_and_a_full_budget_what_anyone_keeps() -> None:
    admission, asked = Admission(100, 4, of_alice), []

    def reclaim(name: str | None) -> bool:
        asked.append(name)
        return False

    admission.reclaim = reclaim
    with admission.reserve(50, name="alice"), pytest.raises(NameLimitError):
        admission.reserve(10, name="alice")
    with admission.reserve(80), pytest.raises(OverloadedError):
        admission.reserve(30, name="alice")
    assert asked == ["alice", None]


# --- Large requests beside small ones ------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(earmark, "time", clock)
    return clock


def refused(admission: Admission, nbytes: int, who: str, name: str = "") -> str:
    with pytest.raises(OverloadedError) as error:
        admission.reserve(nbytes, name=name, who=who)
    return str(error.value)


def wait_in_vain(admission: Admission, clock: Clock, nbytes: int = 90, name: str = "") -> None:
    """A large request comes again and again, for as long as it takes until bytes are kept for it."""
    for _ in range(8):
        refused(admission, nbytes, "large", name)
        clock.now += 0.5


def test_small_requests_leave_room_to_a_large_one_that_has_been_refused_for_some_seconds(clock: Clock) -> None:
    admission = Admission(100, 10)
    first, second = admission.reserve(20, who="small"), admission.reserve(20, who="small")
    refused(admission, 90, "large")
    admission.reserve(20, who="small").release()  # It has not waited for long.
    wait_in_vain(admission, clock)
    first.release()
    assert "90 B are kept for a request that waits for long" in refused(admission, 20, "small")
    admission.reserve(20).release()  # A part of a joint step.
    second.release()
    admission.reserve(10, who="small").release()  # There is room for both.
    large = admission.reserve(90, who="large")
    large.release()
    admission.reserve(90, who="small").release()


def test_a_large_request_that_does_not_come_back_holds_nobody_up(clock: Clock) -> None:
    admission = Admission(100, 10)
    with admission.reserve(20):
        wait_in_vain(admission, clock)
        refused(admission, 20, "small")
        clock.now += 2.0
        admission.reserve(20, who="small").release()


def test_room_that_others_hold_for_long_is_waited_for_in_vain_and_not_again_at_once(clock: Clock) -> None:
    admission, served = Admission(100, 10), 0
    with admission.reserve(20):
        for _ in range(300):
            refused(admission, 90, "large")
            try:
                admission.reserve(20, who="small").release()
                served += 1
            except OverloadedError:
                pass
            clock.now += 0.1
    assert served > 0.85 * 300


def test_no_bytes_are_kept_beyond_the_share_of_a_name(clock: Clock) -> None:
    admission = Admission(100, 10, of_alice)
    with admission.reserve(30, name="alice"), admission.reserve(50):
        wait_in_vain(admission, clock, 40, "alice")
        admission.reserve(20, who="small").release()
