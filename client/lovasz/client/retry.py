"""The policy of calls: when one is tried again, and which of several servers it goes to.

gRPC carries it out by a channel's service config, except that this module tries streams again.

gRPC's own retry is not used for streams: when it sends a stream's messages again, it now and then leaves one out
(seen with grpcio 1.63 and 1.85), and what it keeps of them until the server answers is memory spent. A loss has no
side effects, so a stream can be tried again at any point.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar, cast

import grpc

MAX_ATTEMPTS = 5
INITIAL_BACKOFF_SECONDS = 0.3
BACKOFF_MULTIPLIER = 3.0
MAX_BACKOFF_SECONDS = 5.0
JITTER = 0.2
"""Backoffs are spread by this share to either side, as gRPC does."""
RETRYABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
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


def service_config(methods: Sequence[str] = (), load_balancing: str | None = None) -> str:
    """The policy in gRPC's form.

    Args:
        methods: those of LossService that gRPC tries again.
        load_balancing: one of ``LOAD_BALANCING``; None: gRPC's own choice, the first address that answers.
    """
    config: dict[str, object] = {}
    if load_balancing is not None:
        config["loadBalancingConfig"] = [_LOAD_BALANCING[load_balancing]]
    if methods:
        config["methodConfig"] = [_retrying(methods)]
    return json.dumps(config)


def _retrying(methods: Sequence[str]) -> dict[str, object]:
    policy = {
        "maxAttempts": MAX_ATTEMPTS,
        "initialBackoff": f"{INITIAL_BACKOFF_SECONDS}s",
        "backoffMultiplier": BACKOFF_MULTIPLIER,
        "maxBackoff": f"{MAX_BACKOFF_SECONDS}s",
        "retryableStatusCodes": [code.name for code in RETRYABLE],
    }
    names = [{"service": "lovasz.v1.LossService", "method": method} for method in methods]
    return {"name": names, "retryPolicy": policy}


def with_retries(call: Callable[[float], AnswerT], timeout: float) -> AnswerT:
    """Makes a call, and makes it again while that can help and the timeout allows.

    Args:
        call: gets the seconds that are left.

    Raises:
        grpc.RpcError: what the last attempt ended with.
    """
    deadline = time.monotonic() + timeout
    attempt = 1
    while True:
        try:
            return call(deadline - time.monotonic())
        except grpc.RpcError as error:
            delay = _delay(error, attempt)
            if delay is None or time.monotonic() + delay >= deadline:
                raise
        time.sleep(delay)
        attempt += 1


def _delay(error: grpc.RpcError, attempt: int) -> float | None:
    """Seconds to wait before the next attempt; None: there should be none."""
    if error.code() not in RETRYABLE or attempt >= MAX_ATTEMPTS:
        return None
    metadata = dict(cast("Iterable[tuple[str, str | bytes]]", error.trailing_metadata() or ()))
    if PUSHBACK_KEY in metadata:
        milliseconds = str(metadata[PUSHBACK_KEY])
        return int(milliseconds) / 1000 if milliseconds.isdecimal() else None
    backoff = min(INITIAL_BACKOFF_SECONDS * BACKOFF_MULTIPLIER ** (attempt - 1), MAX_BACKOFF_SECONDS)
    return backoff * random.uniform(1 - JITTER, 1 + JITTER)
