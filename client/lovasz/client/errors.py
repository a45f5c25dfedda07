"""The client's own errors, and where the errors of gRPC and of ``lovasz.spec`` are translated into them."""

from __future__ import annotations

from typing import Literal, TypeAlias

import grpc

from lovasz.spec import InvalidInput


class LossError(Exception):
    """A loss could not be computed. ::

    LossError
    ├── InvalidInputError       the request is invalid; also a ValueError
    ├── ServerOverloadedError   the server is full, after all retries; or the request can never fit
    ├── AuthenticationError     the server requires a token, and the call has no valid one
    ├── TLSError                TLS failed; it says which check
    ├── ServerUnavailableError  no server answers, or it is stopping, after all retries
    ├── DeadlineExceededError   no answer within the timeout; also a TimeoutError
    ├── CallAbortedError        a rank of the joint step is missing or failed, or the call stalled: try the step again
    ├── JointMismatchError      the request does not match those of the other ranks, or two trainings share a run
    ├── CallCancelledError      the call was cancelled, or its client was closed
    ├── IncompatibleServerError what answers does not speak gRPC, or not lovasz.v1 as this client does
    └── ServerFaultError        the server failed on the request; its log says why
    """


class InvalidInputError(LossError, InvalidInput):
    """The request is invalid. The message names the field, the value that it got and what was expected.

    Attributes:
        field: the field's name.
        problem: the rest of the message.
    """

    def __init__(self, field: str, problem: str) -> None:
        InvalidInput.__init__(self, field, problem)


class ServerOverloadedError(LossError):
    """The server was full, after all retries; or the request can never fit."""


class AuthenticationError(LossError):
    """The server requires a token, and the call has no valid one."""


TLSCheck: TypeAlias = Literal[
    "expired",
    "not yet valid",
    "wrong host",
    "unknown CA",
    "client certificate missing",
    "client certificate refused",
    "TLS needed",
    "no TLS",
    "files",
    "no agreement",
    "other",
]


class TLSError(LossError):
    """TLS failed, so there is no connection. The message says why.

    Attributes:
        check: what failed. Of the server's certificate: ``"expired"``, ``"not yet valid"``, ``"wrong host"`` or
            ``"unknown CA"``. Of this client's: ``"client certificate missing"`` or ``"client certificate refused"``.
            ``"TLS needed"``: the server speaks TLS, and the client has none; ``"no TLS"``: the reverse.
            ``"files"``: the client's files cannot be used. ``"no agreement"``: no version or cipher in common.
            ``"other"``: see the message.
    """

    def __init__(self, text: str, check: TLSCheck = "other") -> None:
        super().__init__(text)
        self.check: TLSCheck = check

    def __reduce__(self) -> tuple[type[TLSError], tuple[str, TLSCheck]]:
        return TLSError, (str(self), self.check)


class ServerUnavailableError(LossError):
    """After all retries, no server answers at the target, or it is stopping, or its device does not answer."""


class DeadlineExceededError(LossError, TimeoutError):
    """The answer did not arrive within the timeout."""


class CallAbortedError(LossError):
    """The joint step was given up, or the call stalled.

    A step is given up when a rank is missing or cannot be computed, or when all ranks wait at different steps. The
    message names the ranks. All ranks can try the step again.
    """


class JointMismatchError(LossError):
    """The request does not match those of the other ranks of its step, or another training has a run of the same name.

    The message names the difference, or the address of the other training.
    """


class CallCancelledError(LossError):
    """The call was cancelled, or its client was closed."""


class IncompatibleServerError(LossError):
    """What answers at the target does not speak gRPC, or not lovasz.v1 as this client does."""


class ServerFaultError(LossError):
    """The server failed on the request; its log says why."""


_BY_CODE: dict[grpc.StatusCode, type[LossError]] = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: ServerOverloadedError,
    grpc.StatusCode.UNAVAILABLE: ServerUnavailableError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.ABORTED: CallAbortedError,
    grpc.StatusCode.FAILED_PRECONDITION: JointMismatchError,
    grpc.StatusCode.CANCELLED: CallCancelledError,
    grpc.StatusCode.UNIMPLEMENTED: IncompatibleServerError,
}
_NO_GRPC = ("Failed parsing HTTP/2", "Trying to connect an http1.x server")
"""gRPC's texts where something answers in HTTP/1, or does not speak HTTP at all."""
_RESET = "RST_STREAM"
"""In gRPC's text, with INTERNAL, where a proxy ends a call whose server has gone; servers end theirs with a status."""
_NOT_REACHED = "failed to connect to all addresses"
_NOT_RESOLVED = ("errors resolving", "DNS resolution failed")
"""Newer and older versions of gRPC."""


def from_rpc_error(error: grpc.RpcError, target: str, remark: str = "") -> LossError:
    """The client's error for an error of gRPC, with a remark at the end of its text."""
    code, details = error.code(), error.details() or ""
    if speaks_no_grpc(error):
        return IncompatibleServerError(
            f"{target}: what answers there does not speak gRPC: is it the metrics port (9095 by default)? "
            f"Expected the port of --listen (50051 by default) ({code.name}){remark}"
        )
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        field, _, problem = details.partition(": ")
        return InvalidInputError(field, problem)
    if code is grpc.StatusCode.UNAVAILABLE and _NOT_REACHED in details:
        details = f"no server answers there; is it running (lovasz-server --listen {target})? {details}"
    if code is grpc.StatusCode.UNAVAILABLE and any(text in details for text in _NOT_RESOLVED):
        details = f"the host name could not be resolved (DNS); is it spelt correctly? {details}"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        details = f"no answer arrived within the timeout of the call: {details}"
    kind = ServerUnavailableError if was_reset(error) else _BY_CODE.get(code, ServerFaultError)
    return kind(f"{target}: {details or code.name} ({code.name}){remark}")


def speaks_no_grpc(error: grpc.RpcError) -> bool:
    """Whether what answers at the target is no gRPC server, so that trying again does not help."""
    details = error.details() or ""
    return error.code() is grpc.StatusCode.UNAVAILABLE and any(text in details for text in _NO_GRPC)


def was_reset(error: grpc.RpcError) -> bool:
    """Whether the call was cut off on its way, so that trying again can help."""
    return error.code() is grpc.StatusCode.INTERNAL and _RESET in (error.details() or "")


def from_invalid_input(error: InvalidInput) -> InvalidInputError:
    """The client's error for one of ``lovasz.spec``."""
    return InvalidInputError(error.field, error.problem)
