"""Calls that are made several times: which error they end with, and how long they wait in between."""

from __future__ import annotations

from typing import Any, cast

import grpc
import pytest

from lovasz.client.memory_socket import SocketError
from lovasz.client.retry import FIRST_ATTEMPTS, JITTER, MAX_BACKOFF_SECONDS, MAX_JOINT_BACKOFF_SECONDS, Retries
from lovasz.server.schedule.joint.kept import ASK_AGAIN_SECONDS

REFUSED = SocketError(grpc.StatusCode.UNAVAILABLE, "the server is starting", retry_after_milliseconds=100)
FULL = SocketError(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls at a time", retry_after_milliseconds=1)
LOST = SocketError(grpc.StatusCode.UNAVAILABLE, "the connection was lost")
LATE = SocketError(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")


def error_of(timeout: float, *ends: grpc.RpcError) -> grpc.RpcError:
    """The error of a call whose attempts end like this."""
    rest = iter(ends)

    def attempt(left: float) -> None:
        assert left > 0
        raise next(rest)

    with pytest.raises(grpc.RpcError) as raised:
        Retries().call(attempt, timeout)
    assert next(rest, None) is None, "an attempt was left out"
    return raised.value


def test_an_attempt_that_had_no_time_does_not_hide_the_reason_before() -> None:
    assert error_of(0.5, REFUSED, REFUSED, LATE) is REFUSED


def test_an_attempt_that_had_time_tells_that_it_ended_by_the_timeout() -> None:
    assert error_of(60.0, REFUSED, LATE) is LATE
    assert error_of(0.5, LATE) is LATE


@pytest.mark.parametrize("refused", [REFUSED, FULL], ids=["starting", "full"])
def test_a_server_that_says_when_to_try_again_was_heard_from(refused: SocketError) -> None:
    ends = [refused] * 3 * FIRST_ATTEMPTS

    def attempt(left: float) -> str:
        if ends:
            raise ends.pop()
        return "answer"

    retries = Retries()
    retries._closed = cast("Any", Waits())
    assert retries.call(attempt, 60.0) == "answer"


class Waits:
    """In place of the event of a closed client: notes how long it would be waited for."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def wait(self, seconds: float) -> bool:
        self.seconds.append(seconds)
        return False


def waits(attempts: int, *, is_joint: bool, was_answered: bool) -> list[float]:
    """How long a client waits before it repeats calls that no server answers."""
    retries, waits, results = Retries(), Waits(), [LOST] * attempts

    def attempt(left: float) -> None:
        if results:
            raise results.pop()

    if was_answered:
        retries.call(lambda left: None, 1.0)
    retries._closed = cast("Any", waits)
    retries.call(attempt, 1000.0, is_joint=is_joint)
    return waits.seconds


def test_a_rank_of_a_joint_step_comes_again_soon_enough_to_be_waited_for() -> None:
    of_rank = waits(20, is_joint=True, was_answered=True)
    assert all(seconds <= MAX_JOINT_BACKOFF_SECONDS * (1 + JITTER) for seconds in of_rank)
    assert max(of_rank) + 0.5 < ASK_AGAIN_SECONDS
    assert 4.0 <= max(waits(20, is_joint=False, was_answered=True)) <= MAX_BACKOFF_SECONDS * (1 + JITTER)


def test_a_client_that_has_not_heard_from_a_server_gives_one_that_starts_the_same_time_for_joint_steps() -> None:
    assert sum(waits(4, is_joint=True, was_answered=False)) >= 0.8 * (0.3 + 0.9 + 2.7 + 5.0)
