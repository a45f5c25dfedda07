"""A real gRPC server of a few lines whose answers a test writes: for what a good server never does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import grpc
import numpy as np

from lovasz import spec, wire
from lovasz.v1 import loss_pb2 as pb
from lovasz.v1 import loss_pb2_grpc


@dataclass
class Answer:
    """A header and the bytes of a gradient; without a header, the bytes are all that is sent."""

    header: pb.ResponseHeader | None
    grad: bytes


Script = Callable[[int, pb.RequestHeader, grpc.ServicerContext], Answer]
"""Makes the answer to a call: its number (from 0), its header and its context, to abort with."""


def good_answer(header: pb.RequestHeader) -> Answer:
    """Fits the request: the loss is the weight of its first term, the gradient 0."""
    request = wire.Request.from_proto(header)
    channels = request.layout.channels
    terms = tuple(
        spec.TermResult(loss.kind, 0.5, np.zeros(0 if isinstance(loss, spec.CrossEntropy) else channels))
        for _, loss in request.loss.terms
    )
    counts = np.zeros(channels, np.int64)
    grad = request.logits if request.want_grad else None
    loss = request.loss.terms[0][0]
    response = wire.Response(loss, terms, counts, counts, grad, 1.0, spec.Timing(0.0, 0.0, 0.0, 1))
    return Answer(response.to_proto(), bytes(grad.nbytes if grad else 0))


def abort(
    context: grpc.ServicerContext, code: grpc.StatusCode, details: str, pushback_ms: int | None = None
) -> NoReturn:
    """Ends a call; with a time after which to try again, if one is given (negative: not at all)."""
    if pushback_ms is not None:
        context.set_trailing_metadata(((wire.PUSHBACK_KEY, str(pushback_ms)),))
    context.abort(code, details)
    raise AssertionError("abort returned")


def always(code: grpc.StatusCode, details: str) -> Script:
    """Fails every call."""

    def script(call: int, header: pb.RequestHeader, context: grpc.ServicerContext) -> Answer:
        abort(context, code, details, pushback_ms=-1)

    return script


def until_gone(context: grpc.ServicerContext) -> None:
    """Waits for the caller to give up."""
    gone = threading.Event()
    if context.add_callback(gone.set):
        gone.wait()


@dataclass
class ScriptedServer(loss_pb2_grpc.LossServiceServicer):
    """Answers by its script.

    Attributes:
        methods: the methods that were called, in the order of the calls.
        received_bytes: the payload of each loss that was answered.
        info_failures: how many calls of GetServerInfo are answered with UNAVAILABLE before one is answered.
    """

    script: Script
    target: str = ""
    methods: list[str] = field(default_factory=list)
    received_bytes: list[int] = field(default_factory=list)
    info_failures: int = 0
    info: pb.GetServerInfoResponse = field(default_factory=pb.GetServerInfoResponse)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def _count(self, method: str) -> int:
        with self._lock:
            self.methods.append(method)
            return len(self.methods) - 1

    def Compute(self, request: pb.ComputeRequest, context: grpc.ServicerContext) -> pb.ComputeResponse:
        answer = self.script(self._count("Compute"), request.header, context)
        self.received_bytes.append(len(request.logits) + len(request.labels))
        return pb.ComputeResponse(header=answer.header, grad=answer.grad)

    def ComputeStream(
        self, request_iterator: Iterator[pb.ComputeStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ComputeStreamResponse]:
        answer = self.script(self._count("ComputeStream"), next(request_iterator).header, context)
        self.received_bytes.append(sum(len(message.chunk) for message in request_iterator))
        if answer.header is not None:
            yield pb.ComputeStreamResponse(header=answer.header)
        yield pb.ComputeStreamResponse(chunk=answer.grad)

    def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
        if self._count("GetServerInfo") < self.info_failures:
            abort(context, grpc.StatusCode.UNAVAILABLE, "still starting")
        return self.info


@contextmanager
def serving(script: Script = lambda call, header, context: good_answer(header)) -> Iterator[ScriptedServer]:
    """A server that answers by the script, on a free port."""
    servicer = ScriptedServer(script)
    with ThreadPoolExecutor(16) as calls:
        server = grpc.server(calls)
        loss_pb2_grpc.add_LossServiceServicer_to_server(servicer, server)
        servicer.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield servicer
        finally:
            server.stop(None).wait()


@contextmanager
def serving_nothing() -> Iterator[str]:
    """The target of a gRPC server that does not know the loss service."""
    with ThreadPoolExecutor(2) as calls:
        server = grpc.server(calls)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()
