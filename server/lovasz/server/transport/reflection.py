"""The reflection service: says which services and messages there are, to few callers at a time, and not for long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from lovasz.server.errors import NoRequestsLeftError
from lovasz.server.observe.metrics import Metrics
from lovasz.server.transport.threads import OwnThreads
from lovasz.server.transport.timed_calls import TimedCalls

SERVICE_NAME = reflection.SERVICE_NAME
_THREADS = 4
_STREAMS = 2
_SECONDS = 10.0


class Reflection(OwnThreads):
    """The service, on threads of its own."""

    def __init__(self, service_names: Sequence[str], metrics: Metrics) -> None:
        super().__init__(_THREADS, "reflection")
        self._servicer = reflection.ReflectionServicer((*service_names, SERVICE_NAME))
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

        self.run_here(info)
        request, response = reflection_pb2.ServerReflectionRequest, reflection_pb2.ServerReflectionResponse
        method = grpc.stream_stream_rpc_method_handler(info, request.FromString, response.SerializeToString)
        return grpc.method_handlers_generic_handler(SERVICE_NAME, {"ServerReflectionInfo": method})
