"""The reflection service: says which services and messages there are, to few callers at a time, and not for long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from lovasz.server.errors import NoRequestsLeftError
from lovasz.server.observe.metrics import Metrics
from lovasz.server.transport.threads import start_all
from lovasz.server.transport.timed_calls import TimedCalls

SERVICE_NAME = reflection.SERVICE_NAME
_THREADS = 4
_STREAMS = 2
_SECONDS = 10.0


class Reflection:
    """The service, on threads of its own."""

    def __init__(self, service_names: Sequence[str], metrics: Metrics) -> None:
        self._servicer = reflection.ReflectionServicer((*service_names, SERVICE_NAME))
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="reflection")
        self.streams = TimedCalls("reflection streams", _SECONDS, _STREAMS, metrics)

    def handler(self) -> grpc.GenericRpcHandler:
        """Its one method."""

        def info(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            try:
                stream = self.streams.open(context)
            except NoRequestsLeftError as error:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
            with stream:
                yield from self._servicer.ServerReflectionInfo(requests, context)

        info.experimental_thread_pool = self._threads  # type: ignore[attr-defined]
        request, response = reflection_pb2.ServerReflectionRequest, reflection_pb2.ServerReflectionResponse
        method = grpc.stream_stream_rpc_method_handler(info, request.FromString, response.SerializeToString)
        return grpc.method_handlers_generic_handler(SERVICE_NAME, {"ServerReflectionInfo": method})

    def start_threads(self) -> None:
        """Starts the threads of the service."""
        start_all(self._threads, _THREADS)

    def end_threads(self, *, wait: bool) -> None:
        """Ends the threads of the service."""
        self._threads.shutdown(wait=wait, cancel_futures=True)
