"""How each error leaves the server: one row an error."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from lovasz.server.errors import (
    AbandonedError,
    DeviceError,
    ExpiredError,
    JointBrokenError,
    JointMismatchError,
    NameLimitError,
    NoBytesLeftError,
    NoRequestsLeftError,
    RegroupError,
    RunConflictError,
    SessionLostError,
    StalledError,
    StartingError,
    StoppingError,
    TooLargeError,
    UnauthenticatedError,
)
from lovasz.server.observe.metrics import Abandonment, Rejection
from lovasz.spec import InvalidInput


@dataclass(frozen=True)
class Status:
    """What becomes of a call that ends with an error.

    Attributes:
        code: what the caller receives.
        rejection: what it counts as in ``lovasz_rejections``; None: not counted there.
        abandonment: what it counts as in ``lovasz_abandoned``; None: not counted there.
        stalled: whether it counts in ``lovasz_stalled``.
        logged: whether the log says who was refused, and why.
    """

    code: grpc.StatusCode
    rejection: Rejection | None = None
    abandonment: Abandonment | None = None
    stalled: bool = False
    logged: bool = False


STATUS: dict[type[BaseException], Status] = {
    InvalidInput: Status(grpc.StatusCode.INVALID_ARGUMENT, rejection=Rejection.INVALID, logged=True),
    NoBytesLeftError: Status(grpc.StatusCode.RESOURCE_EXHAUSTED, rejection=Rejection.NO_BYTES),
    NoRequestsLeftError: Status(grpc.StatusCode.RESOURCE_EXHAUSTED, rejection=Rejection.NO_REQUESTS),
    NameLimitError: Status(grpc.StatusCode.RESOURCE_EXHAUSTED, rejection=Rejection.NAME_LIMIT),
    TooLargeError: Status(grpc.StatusCode.RESOURCE_EXHAUSTED, rejection=Rejection.TOO_LARGE, logged=True),
    UnauthenticatedError: Status(grpc.StatusCode.UNAUTHENTICATED, rejection=Rejection.UNAUTHENTICATED, logged=True),
    StartingError: Status(grpc.StatusCode.UNAVAILABLE, rejection=Rejection.STARTING),
    StoppingError: Status(grpc.StatusCode.UNAVAILABLE, rejection=Rejection.STOPPING),
    DeviceError: Status(grpc.StatusCode.UNAVAILABLE),
    ExpiredError: Status(grpc.StatusCode.DEADLINE_EXCEEDED, abandonment=Abandonment.EXPIRED),
    AbandonedError: Status(grpc.StatusCode.CANCELLED, abandonment=Abandonment.CANCELLED),
    StalledError: Status(grpc.StatusCode.ABORTED, stalled=True, logged=True),
    JointBrokenError: Status(grpc.StatusCode.ABORTED),
    RegroupError: Status(grpc.StatusCode.UNAVAILABLE),
    JointMismatchError: Status(grpc.StatusCode.FAILED_PRECONDITION, rejection=Rejection.MISMATCH, logged=True),
    RunConflictError: Status(grpc.StatusCode.FAILED_PRECONDITION, rejection=Rejection.CONFLICT, logged=True),
    SessionLostError: Status(grpc.StatusCode.UNAVAILABLE),
}

FAULT = Status(grpc.StatusCode.INTERNAL)
"""Any other error is a fault of the server: the log has its trace, and the caller is told no details."""

FAULT_TEXT = "the server failed on this request; its log says why"

CODES = (grpc.StatusCode.OK, *dict.fromkeys(status.code for status in (*STATUS.values(), FAULT)))
"""Every code that a call can end with, each once."""


def status_of(error: BaseException) -> Status:
    """The row of an error's type."""
    return STATUS.get(type(error), FAULT)
