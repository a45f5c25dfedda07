"""The gate in front of a service: only calls with a token pass."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from typing import Any, NoReturn

import grpc

from lovasz.server.access.tokens import Tokens, bearer
from lovasz.server.errors import UnauthenticatedError
from lovasz.server.observe.logs import Sparingly
from lovasz.server.observe.metrics import Metrics
from lovasz.server.transport.identity import CALLER_NAME
from lovasz.server.transport.status import status_of
from lovasz.server.transport.threads import OwnThreads

_HEADER = "authorization"
_THREADS = 2
_MISSING = "a token is missing; expected metadata 'authorization: Bearer TOKEN'"
_UNKNOWN = "the token is not known"


class Gate(OwnThreads):
    """Finds out who makes a call before it takes a thread or its message is read.

    Calls without a valid token are refused from threads of the gate's own.
    """

    def __init__(self, tokens: Tokens, metrics: Metrics) -> None:
        super().__init__(_THREADS, "gate")
        self._tokens, self._metrics = tokens, metrics
        self._log = Sparingly(logging.getLogger(__name__))

    def around(self, service: grpc.GenericRpcHandler) -> grpc.GenericRpcHandler:
        """The service, for calls with a token."""
        return _Guarded(service, self)

    def refusal(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """What answers in place of the service; None if the call may pass. Notes the name of its token."""
        token = _token(details.invocation_metadata)
        name = None if token is None else self._tokens.name_of(token)
        if name is not None:
            CALLER_NAME.set(name)
            return None
        refuse = partial(self._refuse, details.method, _MISSING if token is None else _UNKNOWN)
        self.run_here(refuse)
        return grpc.stream_unary_rpc_method_handler(refuse)

    def _refuse(self, method: str, text: str, _: object, context: grpc.ServicerContext) -> NoReturn:
        status = status_of(UnauthenticatedError(text))
        assert status.rejection is not None
        name = method.rpartition("/")[2]
        self._metrics.count_unread(name, status.code.name, status.rejection)
        self._log.info("a request was refused", peer=context.peer(), method=name, reason=text)
        context.abort(status.code, text)


class _Guarded(grpc.GenericRpcHandler):
    def __init__(self, service: grpc.GenericRpcHandler, gate: Gate) -> None:
        self._service, self._gate = service, gate

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = self._service.service(handler_call_details)
        return handler and (self._gate.refusal(handler_call_details) or handler)


def _token(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    return next((bearer(value) for key, value in metadata if key == _HEADER and isinstance(value, str)), None)
