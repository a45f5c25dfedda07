"""The client's own errors, and the one place where gRPC's are turned into them."""

from __future__ import annotations

import grpc

from lovasz.spec import InvalidInput


class LossError(Exception):
    """A loss could not be computed. ::

    LossError
    ├── InvalidInputError       the request cannot be computed with; also a ValueError
    ├── ServerOverloadedError   no room, after all retries; or the request can never fit
    ├── ServerUnavailableError  no server there, or it is stopping, after all retries
    ├── DeadlineExceededError   no answer within the timeout; also a TimeoutError
    ├── CallAbortedError        a rank of its joint step is missing or failed, or the call stalled: try the step again
    ├── JointMismatchError      the request does not fit those of the other ranks of its step
    ├── CallCancelledError      the call was cancelled, or its client was closed
    ├── IncompatibleServerError whatever is there does not speak lovasz.v1 as this client does
    └── ServerFaultError        the server failed on the request; its log says why
    """


class InvalidInputError(LossError, InvalidInput):
    """The request cannot be computed with; the text names the field, what came and what was expected.

    Attributes:
        field: the field's name.
        problem: the rest of the text.
    """

    def __init__(self, field: str, problem: str) -> None:
        InvalidInput.__init__(self, field, problem)


class ServerOverloadedError(LossError):
    """The server had no room, after all retries; or the request can never fit into it."""


class ServerUnavailableError(LossError):
    """No server answers there, or it is stopping, or its device does not answer, after all retries."""


class DeadlineExceededError(LossError, TimeoutError):
    """The answer did not come within the timeout."""


class CallAbortedError(LossError):
    """The joint step was given up, as a rank is missing or cannot be computed with, and the text names it; or the call
    stalled. The step can be tried again, by all ranks."""


class JointMismatchError(LossError):
    """The request does not fit those of the other ranks of its step; the text names the difference."""


class CallCancelledError(LossError):
    """The call was cancelled, or its client was closed."""


class IncompatibleServerError(LossError):
    """Whatever answers there does not speak lovasz.v1 as this client does."""


class ServerFaultError(LossError):
    """The server failed on the request; its log says why."""


_BY_CODE: dict[grpc.StatusCode, type[LossError]] = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: ServerOverloadedError,
    grpc.StatusCode.UNAVAILABLE: ServerUnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.ABORTED: CallAbortedError,
    grpc.StatusCode.FAILED_PRECONDITION: JointMismatchError,
    grpc.StatusCode.CANCELLED: CallCancelledError,
    grpc.StatusCode.UNIMPLEMENTED: IncompatibleServerError,
}


def from_rpc_error(error: grpc.RpcError, target: str) -> LossError:
    """The client's error for one of gRPC's."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        field, _, problem = details.partition(": ")
        return InvalidInputError(field, problem)
    return _BY_CODE.get(code, ServerFaultError)(f"{target}: {details or code.name} ({code.name})")
