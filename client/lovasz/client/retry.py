"""The policy of calls: when one is tried again, and which of several servers it goes to.

The second is carried out by gRPC, the first by this module. gRPC's own retry makes five attempts at most, in ten
seconds, which a server that is started anew may take longer than; and when it sends a stream's messages again, it now
and then leaves one out (seen with grpcio 1.63 and 1.85). A loss has no side effects, so a call can be made again at any
point.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar, cast

import grpc

FIRST_ATTEMPTS = 5
"""Of a client that has had no answer yet, in about ten seconds: its address may be wrong. Later it is patient."""
INITIAL_BACKOFF_SECONDS = 0.3
BACKOFF_MULTIPLIER = 3.0
MAX_BACKOFF_SECONDS = 5.0
JITTER = 0.2
"""Backoffs are spread by this share to either side."""
RETRYABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)
"""gRPC's server cancels calls that come at the moment when it closes."""
PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""The server's word on when to try again, in trailing metadata; negative: not at all."""

RUN_KEY = "lovasz-run"
"""Metadata of joint calls: their run, percent-encoded. The calls of a run must reach one server."""
_LOAD_BALANCING: dict[str, dict[str, dict[str, str]]] = {
    "round_robin": {"round_robin": {}},
    "ring_hash": {"ring_hash_experimental": {"requestHashHeader": RUN_KEY}},
}
LOAD_BALANCING = tuple(_LOAD_BALANCING)

AnswerT = TypeVar("AnswerT")


def service_config(load_balancing: str | None) -> str:
    """gRPC's form of one of ``LOAD_BALANCING``; of None: its own choice, the first address that answers."""
    return json.dumps({} if load_balancing is None else {"loadBalancingConfig": [_LOAD_BALANCING[load_balancing]]})


class Retries:
    """Makes calls again while that can help: before a client has had its first answer, :data:`FIRST_ATTEMPTS` times in
    all; after that, until their timeout."""

    def __init__(self) -> None:
        self._answered = False
        self._closed = threading.Event()

    def close(self) -> None:
        """Nothing is made again from now on."""
        self._closed.set()

    def call(self, attempt: Callable[[float], AnswerT], timeout: float) -> AnswerT:
        """
        Args:
            attempt: makes the call; gets the seconds that are left.

        Raises:
            grpc.RpcError: what the last attempt ended with.
        """
        deadline, number = time.monotonic() + timeout, 1
        while True:
            try:
                answer = attempt(deadline - time.monotonic())
            except grpc.RpcError as error:
                delay = self._delay(error, number)
                if delay is None or time.monotonic() + delay >= deadline or self._closed.wait(delay):
                    raise
            else:
                self._answered = True
                return answer
            number += 1

    def _delay(self, error: grpc.RpcError, number: int) -> float | None:
        """Seconds to wait before the next attempt; None: there should be none."""
        if error.code() not in RETRYABLE or (number >= FIRST_ATTEMPTS and not self._answered):
            return None
        metadata = dict(cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ()))
        if PUSHBACK_KEY in metadata:
            milliseconds = str(metadata[PUSHBACK_KEY])
            return int(milliseconds) / 1000 if milliseconds.isdecimal() else None
        backoff = min(INITIAL_BACKOFF_SECONDS * BACKOFF_MULTIPLIER ** (number - 1), MAX_BACKOFF_SECONDS)
        return backoff * random.uniform(1 - JITTER, 1 + JITTER)
