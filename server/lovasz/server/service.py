"""The gRPC service: reads a call, takes it through admission, staging and queue, and sends the answer.

Holds the one table that maps what can go wrong to gRPC status codes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError
from types import TracebackType

import grpc
import torch

from lovasz import wire
from lovasz.server.admission import Admission, Permit
from lovasz.server.batcher import Answer, Batcher, Entry
from lovasz.server.engine import Engine, hardware_name, is_out_of_memory
from lovasz.server.errors import (
    AbandonedError,
    DeviceError,
    ExpiredError,
    OverloadedError,
    ServerError,
    StoppingError,
    TooLargeError,
)
from lovasz.server.metrics import Metrics
from lovasz.server.staging import Staging
from lovasz.spec import LOSS_KINDS, InvalidInput, Timing
from lovasz.v1 import loss_pb2 as pb
from lovasz.v1 import loss_pb2_grpc
from lovasz.version import VERSION

_log = logging.getLogger(__name__)

STATUS: dict[type[BaseException], grpc.StatusCode] = {
    InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    TooLargeError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    StoppingError: grpc.StatusCode.UNAVAILABLE,
    DeviceError: grpc.StatusCode.UNAVAILABLE,
    ExpiredError: grpc.StatusCode.DEADLINE_EXCEEDED,
    AbandonedError: grpc.StatusCode.CANCELLED,
}
"""What each error leaves the server as; whatever is not here leaves as a bland INTERNAL."""

_MAX_TEXT = 2000
"""Characters of an error's text: gRPC's metadata is limited."""

_REJECTION_REASONS: dict[type[BaseException], str] = {
    InvalidInput: "invalid",
    OverloadedError: "overloaded",
    TooLargeError: "too_large",
    StoppingError: "stopping",
}


class LossServicer(loss_pb2_grpc.LossServiceServicer):
    """Answers the three methods of LossService."""

    def __init__(
        self,
        admission: Admission,
        batcher: Batcher,
        engine: Engine,
        metrics: Metrics,
        device_stall_seconds: float,
    ) -> None:
        self.admission = admission
        self.batcher = batcher
        self.engine = engine
        self.metrics = metrics
        self.device_stall_seconds = device_stall_seconds

    def Compute(self, request: pb.ComputeRequest, context: grpc.ServicerContext) -> pb.ComputeResponse:  # noqa: N802
        with _Call(self, "Compute", context) as call:
            header = call.read_header(request.header)
            answer = call.compute(header, _fields(request, header))
            return pb.ComputeResponse(header=call.response_header(header, answer), grad=bytes(_grad_bytes(answer)))

    def ComputeStream(  # noqa: N802
        self, request_iterator: Iterator[pb.ComputeStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ComputeStreamResponse]:
        with _Call(self, "ComputeStream", context) as call:
            first = next(request_iterator, None)
            if first is None or first.WhichOneof("message") != "header":
                raise InvalidInput("header", "the stream does not begin with one; expected the header, then chunks")
            header = call.read_header(first.header)
            answer = call.compute(header, _chunks(request_iterator))
            yield pb.ComputeStreamResponse(header=call.response_header(header, answer))
            for chunk in wire.chunks([_grad_bytes(answer)]):
                yield pb.ComputeStreamResponse(chunk=chunk)

    def GetServerInfo(  # noqa: N802
        self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
        device = pb.Device(
            name=str(self.engine.device),
            hardware=hardware_name(self.engine.device),
            healthy=self.engine.healthy(self.device_stall_seconds),
        )
        return pb.GetServerInfoResponse(
            version=VERSION,
            devices=[device],
            losses=LOSS_KINDS,
            max_message_bytes=wire.MAX_MESSAGE_BYTES,
            memory_budget_bytes=self.admission.budget_bytes,
            max_requests=self.admission.max_requests,
        )


def _fields(request: pb.ComputeRequest, header: wire.Request) -> Iterator[bytes]:
    for name, data, tensor in (("logits", request.logits, header.logits), ("labels", request.labels, header.labels)):
        if len(data) != tensor.nbytes:
            raise InvalidInput(
                name, f"got {len(data)} bytes; expected {tensor.nbytes} for shape {tensor.shape} as declared"
            )
        yield data


def _chunks(stream: Iterable[pb.ComputeStreamRequest]) -> Iterator[bytes]:
    for message in stream:
        if message.WhichOneof("message") != "chunk":
            raise InvalidInput("message", "got a message without a chunk; expected chunks after the header")
        yield message.chunk


def _grad_bytes(answer: Answer) -> memoryview:
    grad = answer.result.grad
    if grad is None:
        return memoryview(b"")
    return grad.reshape(-1).view(torch.uint8).numpy().data


class _Call:
    """One call from its header to its last byte: its room, its phases, and what becomes of its errors."""

    def __init__(self, service: LossServicer, method: str, context: grpc.ServicerContext) -> None:
        self._service = service
        self._method = method
        self._context = context
        self._loss = "unknown"
        self._permit: Permit | None = None
        self._started = self._received = time.monotonic()
        remaining = context.time_remaining()
        self._deadline = None if remaining is None else self._started + remaining

    def __enter__(self) -> _Call:
        return self

    def read_header(self, message: pb.RequestHeader) -> wire.Request:
        """Raises:
        InvalidInput: the header is not one that can be computed with.
        """
        header = wire.Request.from_proto(message)
        self._loss = header.loss.kind
        return header

    def compute(self, header: wire.Request, payload: Iterable[bytes]) -> Answer:
        """Takes room, receives the payload, queues the request and waits for its answer."""
        service = self._service
        grad_bytes = header.logits.nbytes if header.want_grad else 0
        self._permit = service.admission.reserve(header.payload_bytes + grad_bytes)
        try:
            staging = Staging(header, pinned=service.engine.device.type == "cuda")
        except Exception as error:
            if is_out_of_memory(error):
                raise OverloadedError("the server's host has no memory left for the request's tensors", 1.0) from None
            raise
        staging.receive(payload)
        self._received = time.monotonic()
        entry = Entry(staging.request(), header.loss, header.want_grad, self._deadline)
        if not self._context.add_callback(entry.cancel):
            raise AbandonedError("the caller went away")
        service.batcher.put(entry)
        try:
            answer = entry.future.result()
        except CancelledError:
            service.batcher.discard(entry)
            raise AbandonedError("the caller went away") from None
        finally:
            # An error's trace leads to this frame, and must not keep the tensors alive.
            del entry, staging
        seconds = service.metrics.phase_seconds
        seconds.labels("receive").observe(self._received - self._started)
        seconds.labels("queue").observe(answer.started - self._received)
        seconds.labels("compute").observe(answer.compute_seconds)
        self._computed = time.monotonic()
        return answer

    def response_header(self, header: wire.Request, answer: Answer) -> pb.ResponseHeader:
        result = answer.result
        timing = Timing(
            receive_seconds=self._received - self._started,
            queue_seconds=answer.started - self._received,
            compute_seconds=answer.compute_seconds,
            batch_requests=answer.batch_requests,
        )
        grad = header.logits if header.want_grad else None
        return wire.Response(
            result.loss, result.terms, result.intersection, result.union, grad, answer.grad_scale, timing
        ).to_proto()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._permit is not None:
            self._permit.release()
        if not self._context.is_active() and not isinstance(error, ExpiredError):
            error = self._gone()
        if error is None:
            self._service.metrics.phase_seconds.labels("send").observe(time.monotonic() - self._computed)
            self._count(grpc.StatusCode.OK)
            return
        code = STATUS.get(type(error), grpc.StatusCode.INTERNAL)
        self._count(code)
        if reason := _REJECTION_REASONS.get(type(error)):
            self._service.metrics.rejections.labels(reason).inc()
        if isinstance(error, AbandonedError | ExpiredError):
            self._service.metrics.abandoned.labels("expired" if isinstance(error, ExpiredError) else "cancelled").inc()
        if isinstance(error, OverloadedError):
            self._retry_after(error.retry_after_seconds)
        elif isinstance(error, TooLargeError):
            self._retry_after(-1)
        if kind is GeneratorExit:
            return
        text = str(error)
        if code is grpc.StatusCode.INTERNAL:
            _log.error("unexpected fault", exc_info=error, extra={"method": self._method, "loss": self._loss})
            text = "the server failed on this request; its log says why"
        self._context.abort(code, text[:_MAX_TEXT])

    def _gone(self) -> ServerError:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return ExpiredError("the deadline passed before the answer was sent")
        return AbandonedError("the caller went away")

    def _retry_after(self, seconds: float) -> None:
        """Tells gRPC's own retry how long to wait; negative: not to try again."""
        milliseconds = str(round(seconds * 1000))
        self._context.set_trailing_metadata((("grpc-retry-pushback-ms", milliseconds),))

    def _count(self, code: grpc.StatusCode) -> None:
        self._service.metrics.requests.labels(self._method, self._loss, code.name).inc()
