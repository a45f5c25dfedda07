"""Retries: whether and when a call that failed is made again.

gRPC's own retry is turned off. It makes at most five attempts within ten seconds, and a server may take longer to
restart. And when it sends a stream's messages again, it sometimes leaves one out (seen with grpcio 1.63 and 1.85). A
loss has no side effects, so a call can be repeated at any point.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar, cast

import grpc

from lovasz.client.errors import speaks_no_grpc, was_reset
from lovasz.wire import PUSHBACK_KEY

FIRST_ATTEMPTS = 5
"""Attempts while a client has had no answer yet, as its address may be wrong; about ten seconds. Then: no limit. That a
server says when to try again, as one that is starting or full, counts as an answer."""
INITIAL_BACKOFF_SECONDS = 0.3
BACKOFF_MULTIPLIER = 3.0
MAX_BACKOFF_SECONDS = 5.0
MAX_JOINT_BACKOFF_SECONDS = 1.0
"""For a rank of a joint step, whose peers wait for it. And if its answer was lost, a server that stops goes on for two
seconds only, in which the rank can ask for it again."""
JITTER = 0.2
"""Each backoff is changed by a random share of at most this, up or down."""
TELLING_SECONDS = 1.0
"""An attempt that ends by the timeout after less than this tells nothing: the reason is that of the attempt before."""
RETRYABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)
"""CANCELLED: gRPC's server cancels calls that arrive while it closes."""

AnswerT = TypeVar("AnswerT")


class Retries:
    """Repeats calls while that can help.

    Until its timeout; before the client has heard from a server, at most :data:`FIRST_ATTEMPTS` times in all.
    """

    def __init__(self, is_permanent: Callable[[grpc.RpcError], bool] = speaks_no_grpc) -> None:
        """No call was made yet.

        Args:
            is_permanent: whether, before the client's first answer, trying again does not help after an error.
        """
        self._is_permanent = is_permanent
        self._answered = False
        self._closed = threading.Event()

    def close(self) -> None:
        """Stops all further attempts."""
        self._closed.set()

    def call(self, attempt: Callable[[float], AnswerT], timeout: float, *, is_joint: bool = False) -> AnswerT:
        """Makes a call, and repeats it while it fails and that can help.

        Args:
            attempt: makes the call once; gets the seconds that are left.
            timeout: seconds for all attempts.
            is_joint: whether other ranks wait for it.

        Raises:
            grpc.RpcError: the last attempt's error, or that of the attempt before if the last one had little time.
        """
        deadline, number, before = time.monotonic() + timeout, 1, None
        while True:
            left = deadline - time.monotonic()
            try:
                answer = attempt(left)
            except grpc.RpcError as error:
                if before is not None and left < TELLING_SECONDS and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise before from None
                before, delay = error, self._delay(error, number, is_joint=is_joint)
                if delay is None or time.monotonic() + delay >= deadline or self._closed.wait(delay):
                    raise
            else:
                self._answered = True
                return answer
            number += 1

    def _delay(self, error: grpc.RpcError, number: int, *, is_joint: bool) -> float | None:
        """Seconds to wait before the next attempt; None: make none."""
        metadata = dict(cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ()))
        if PUSHBACK_KEY in metadata:
            self._answered = True
        if error.code() not in RETRYABLE and not was_reset(error):
            return None
        if not self._answered and (number >= FIRST_ATTEMPTS or self._is_permanent(error)):
            return None
        if PUSHBACK_KEY in metadata:
            milliseconds = str(metadata[PUSHBACK_KEY])
            return int(milliseconds) / 1000 if milliseconds.isdecimal() else None
        most = MAX_JOINT_BACKOFF_SECONDS if is_joint and self._answered else MAX_BACKOFF_SECONDS
        backoff = min(INITIAL_BACKOFF_SECONDS * BACKOFF_MULTIPLIER ** (number - 1), most)
        return backoff * random.uniform(1 - JITTER, 1 + JITTER)
