"""Which error a call ends with that was made several times."""

from __future__ import annotations

import grpc
import pytest

from lovasz.client.memory_socket import SocketError
from lovasz.client.retry import Retries

REFUSED = SocketError(grpc.StatusCode.UNAVAILABLE, "the server is starting", retry_after_milliseconds=100)
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
