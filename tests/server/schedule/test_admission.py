"""Admission: bytes and requests, counted and given back."""

from __future__ import annotations

import random
import threading

import pytest

from lovasz.server.errors import OverloadedError, ServerError, StartingError, StoppingError, TooLargeError
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
    with pytest.raises(StartingError, match=r"is starting: it compiles, up to a minute") as refused:
        admission.reserve(10)
    assert refused.value.retry_after_seconds == 1.0
    admission.starting = False
    with admission.reserve(10):
        assert admission.requests_in_flight == 1
