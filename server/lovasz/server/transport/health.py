"""The health service (``grpc.health.v1``): SERVING while the device answers and the server is not stopping."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from lovasz.server.device.engine import Engine
from lovasz.server.errors import ServerError
from lovasz.server.observe.metrics import Metrics
from lovasz.server.transport.call import SERVICE_NAME
from lovasz.server.transport.threads import OwnThreads
from lovasz.server.transport.timed_calls import TimedCalls
from lovasz.server.transport.watchers import Send, Watchers

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
SERVICE_NAMES = ("", SERVICE_NAME)
HEALTH_SERVICE_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_THREADS = 8
_HEADERLESS_CALLS = 4
"""Calls that may wait for their message at a time; threads are left for those whose message is there."""
_HEADER_SECONDS = 2.0

_Status = health_pb2.HealthCheckResponse


class HealthMonitor(OwnThreads):
    """Keeps the status of the health service up to date."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        super().__init__(_THREADS, "health")
        self.watchers = Watchers(self._status_of)
        self.headerless = TimedCalls("calls of health without a message", _HEADER_SECONDS, _HEADERLESS_CALLS, metrics)
        self._engine = engine
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="health", daemon=True)
        self._serving: bool | None = None
        self.look()

    def start_threads(self) -> None:
        super().start_threads()
        self.watchers.start_threads()

    def end_threads(self, *, wait: bool) -> None:
        super().end_threads(wait=wait)
        self.watchers.end_threads(wait=wait)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """The status is NOT_SERVING from now on."""
        self._stopping.set()
        self._thread.join()
        self._serving = False
        self.watchers.tell()

    def handler(self) -> grpc.GenericRpcHandler:
        """The methods of the health service, on threads of their own, so that it answers whatever else is taken."""

        def check(messages: Iterator[Any], context: grpc.ServicerContext) -> health_pb2.HealthCheckResponse:
            status = self._status_of(self._first(messages, context).service)
            if status == _Status.SERVICE_UNKNOWN:
                context.set_code(grpc.StatusCode.NOT_FOUND)
                return _Status()
            return _Status(status=status)

        def watch(messages: Iterator[Any], context: grpc.ServicerContext, send: Send) -> None:
            self.watchers.add(self._first(messages, context).service, context, send)

        self.run_here(check)
        self.run_here(watch)
        watch.experimental_non_blocking = True  # type: ignore[attr-defined]
        decode, encode = health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString
        return grpc.method_handlers_generic_handler(
            HEALTH_SERVICE_NAME,
            {
                "Check": grpc.stream_unary_rpc_method_handler(check, decode, encode),
                "Watch": grpc.stream_stream_rpc_method_handler(watch, decode, encode),
            },
        )

    def _first(self, messages: Iterator[Any], context: grpc.ServicerContext) -> Any:
        try:
            message = self.headerless.first(messages, context)
        except ServerError as error:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        return health_pb2.HealthCheckRequest() if message is None else message

    def _watch(self) -> None:
        while not self._stopping.wait(_LOOK_SECONDS):
            self.look()
            self.watchers.check()

    def _status_of(self, service: str) -> int:
        if service not in SERVICE_NAMES:
            return int(_Status.SERVICE_UNKNOWN)
        return int(_Status.SERVING if self._serving else _Status.NOT_SERVING)

    def look(self) -> None:
        """Takes over what the device's state is now."""
        serving = self._engine.healthy
        if serving == self._serving:
            return
        if self._serving is not None:
            _log.log(logging.INFO if serving else logging.ERROR, "health", extra={"serving": serving})
        self._serving = serving
        self.watchers.tell()
