"""The gRPC service: reads a call, takes it through admission, staging and queue, and sends the answer.

Holds the one table that maps what can go wrong to gRPC status codes.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import grpc
import numpy as np
import torch

from lovasz import wire
from lovasz.server.device.engine import Engine, is_out_of_memory
from lovasz.server.device.hardware import hardware_name
from lovasz.server.errors import (
    AbandonedError,
    DeviceError,
    ExpiredError,
    JointBrokenError,
    JointMismatchError,
    OverloadedError,
    ServerError,
    SessionLostError,
    StalledError,
    StoppingError,
    TooLargeError,
)
from lovasz.server.memory.staging import Staging, StagingPool
from lovasz.server.observe.logs import Sparingly
from lovasz.server.observe.metrics import Metrics
from lovasz.server.observe.tracing import exemplar
from lovasz.server.schedule.admission import Admission, Permit
from lovasz.server.schedule.batcher import Answer, Batcher, Entry
from lovasz.server.schedule.joint import JointTable, Kept, Seat
from lovasz.server.transport.receiving import Receiver
from lovasz.server.transport.sending import SendWatch
from lovasz.server.transport.shared_memory import SharedMemory
from lovasz.spec import LOSS_KINDS, InvalidInput, Timing
from lovasz.v1 import loss_pb2 as pb
from lovasz.version import VERSION
from lovasz.wire import framing
from lovasz.wire.framing import Bytes

_log = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["LossService"].full_name

STATUS: dict[type[BaseException], grpc.StatusCode] = {
    InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    TooLargeError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    StoppingError: grpc.StatusCode.UNAVAILABLE,
    DeviceError: grpc.StatusCode.UNAVAILABLE,
    ExpiredError: grpc.StatusCode.DEADLINE_EXCEEDED,
    AbandonedError: grpc.StatusCode.CANCELLED,
    StalledError: grpc.StatusCode.ABORTED,
    JointBrokenError: grpc.StatusCode.ABORTED,
    JointMismatchError: grpc.StatusCode.FAILED_PRECONDITION,
    SessionLostError: grpc.StatusCode.UNAVAILABLE,
}
"""What each error leaves the server as; whatever is not here leaves as a bland INTERNAL."""

_LOSSES = (*LOSS_KINDS, "cross_entropy+lovasz_softmax", "unknown")

_MAX_TEXT_BYTES = 2000
"""Of an error's text, in UTF-8: gRPC makes up to three of each, and takes 8 KiB of metadata."""


def _rejection_reason(error: BaseException) -> str | None:
    if isinstance(error, OverloadedError):
        return f"no_{error.lacks}"
    return _REJECTION_REASONS.get(type(error))


_REJECTION_REASONS: dict[type[BaseException], str] = {
    InvalidInput: "invalid",
    TooLargeError: "too_large",
    StoppingError: "stopping",
    JointMismatchError: "mismatch",
}


Message = TypeVar("Message")


@dataclass(frozen=True, kw_only=True)
class LossServicer:
    """Answers the three methods of LossService.

    Attributes:
        shared_memory: one for each socket on which memory can be shared.
        readers: threads that read streams.
        calls: one for each that may be in this service at a time, so that threads are left for health.
        stall_seconds: how long a caller may keep a call waiting.
    """

    admission: Admission
    batcher: Batcher
    joints: JointTable
    engine: Engine
    metrics: Metrics
    staging: StagingPool
    shared_memory: Sequence[SharedMemory]
    readers: Executor
    sending: SendWatch
    calls: threading.Semaphore
    stall_seconds: float
    refusals: Sparingly = field(default_factory=lambda: Sparingly(_log))

    def __post_init__(self) -> None:
        # Counters begin at 0: Prometheus sees no rise in one that begins at its first failure.
        codes = {grpc.StatusCode.OK, grpc.StatusCode.INTERNAL, *STATUS.values()}
        for labels in itertools.product(("Compute", "ComputeStream"), _LOSSES, sorted(code.name for code in codes)):
            self.metrics.requests.labels(*labels)

    def handler(self) -> grpc.GenericRpcHandler:
        """The methods, with messages read and written without protobuf's copies (``lovasz.wire.framing``)."""
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Compute": grpc.unary_unary_rpc_method_handler(
                self.compute, request_deserializer=_or_no_message(framing.UnaryRequest.decode)
            ),
            "ComputeStream": grpc.stream_stream_rpc_method_handler(
                self.compute_stream,
                request_deserializer=_or_no_message(framing.stream_message_decoder(pb.ComputeStreamRequest)),
                response_serializer=framing.encode_stream_message,
            ),
            "GetServerInfo": grpc.unary_unary_rpc_method_handler(
                self.server_info,
                request_deserializer=pb.GetServerInfoRequest.FromString,
                response_serializer=pb.GetServerInfoResponse.SerializeToString,
            ),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    def compute(self, request: framing.UnaryRequest | _NoMessage, context: grpc.ServicerContext) -> bytes:
        with _Call(self, "Compute", context) as call:
            call.enter()
            if isinstance(request, _NoMessage):
                raise request.error("ComputeRequest")
            header = call.read_header(request.header)
            answer = call.compute(header, lambda staging: call.place_fields(staging, header, request))
            grad = call.grad_bytes(answer)
            if header.shared is not None:
                _, _, place = call.shared_tensors(header)
                np.copyto(np.frombuffer(place, np.uint8), np.frombuffer(grad, np.uint8))
                grad = memoryview(b"")
            # Encoded here, as the gradient's memory is given back with the call.
            return framing.UnaryResponse(call.response_header(header, answer), grad).encode()

    def compute_stream(
        self, messages: Iterator[pb.ComputeStreamRequest | memoryview], context: grpc.ServicerContext
    ) -> Iterator[pb.ComputeStreamResponse | memoryview]:
        with _Call(self, "ComputeStream", context) as call:
            call.enter()
            receiver = Receiver(_until_gone(messages), self.readers.submit, self.stall_seconds)
            try:
                header = call.read_header(receiver.header())
                if header.shared is not None:
                    raise InvalidInput("shared_tensors", "came with ComputeStream; expected them with Compute alone")
                answer = call.compute(header, receiver.payload)
            finally:
                receiver.stop()
            yield pb.ComputeStreamResponse(header=call.response_header(header, answer))
            yield from self.sending.watched(wire.chunks([call.grad_bytes(answer)]), context.cancel)

    def server_info(self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext) -> pb.GetServerInfoResponse:
        device = pb.Device(
            name=str(self.engine.device),
            hardware=hardware_name(self.engine.device),
            healthy=self.engine.healthy,
        )
        return pb.GetServerInfoResponse(
            version=VERSION,
            devices=[device],
            losses=LOSS_KINDS,
            max_message_bytes=wire.MAX_MESSAGE_BYTES,
            memory_budget_bytes=self.admission.budget_bytes,
            max_requests=self.admission.max_requests,
        )


@dataclass(frozen=True)
class _NoMessage:
    """Bytes that are no message: gRPC would end the call with INTERNAL, and tell nobody here of it."""

    nbytes: int

    def error(self, expected: str) -> InvalidInput:
        return InvalidInput("message", f"got {self.nbytes} bytes that are no {expected} of lovasz.v1")


def _or_no_message(decode: Callable[[bytes], Message]) -> Callable[[bytes], Message | _NoMessage]:
    def decoded(data: bytes) -> Message | _NoMessage:
        try:
            return decode(data)
        except Exception:
            return _NoMessage(len(data))

    return decoded


def _until_gone(messages: Iterator[Message | _NoMessage]) -> Iterator[Message]:
    """A stream whose caller's leaving is an error of ours: the state of a call keeps gRPC's, and so would keep in a
    circle whatever the trace of that leads to.

    Raises:
        AbandonedError: the caller went away.
        InvalidInput: bytes that are no message.
    """
    try:
        for message in messages:
            if isinstance(message, _NoMessage):
                raise message.error("ComputeStreamRequest")
            yield message
    except grpc.RpcError as error:
        error.__traceback__ = None
        raise AbandonedError("the caller went away") from None


class _Call:
    """One call from its header to its last byte: its room, its phases, and what becomes of its errors."""

    def __init__(self, service: LossServicer, method: str, context: grpc.ServicerContext) -> None:
        self._service = service
        self._method = method
        self._context = context
        self._loss = "unknown"
        self._run = ""
        self._phase = "receive"
        self._seconds: dict[str, float] = {}
        self._inside = False
        self._permit: Permit | None = None
        self._place: Seat | Kept | None = None
        self._joint_wait_seconds = 0.0
        self._staging: Staging | None = None
        self._started = self._received = self._computing = self._computed = time.monotonic()
        remaining = context.time_remaining()
        self._deadline = None if remaining is None else self._started + remaining
        self._trace = exemplar(context.invocation_metadata())

    def __enter__(self) -> _Call:
        return self

    def enter(self) -> None:
        """Raises:
        OverloadedError: too many calls are here, though they may not have come to admission.
        """
        self._inside = self._service.calls.acquire(blocking=False)
        if not self._inside:
            raise OverloadedError("too many calls at a time (--max-requests)", 1.0, "requests")

    def read_header(self, message: pb.RequestHeader) -> wire.Request:
        """Raises:
        InvalidInput: the header is not one that can be computed with.
        """
        header = wire.Request.from_proto(message)
        self._loss = header.loss.kind
        self._run = header.run or ("" if header.joint is None else header.joint.run)
        return header

    def compute(self, header: wire.Request, receive: Callable[[Staging], None]) -> Answer:
        """Takes room, receives the payload, queues the request and waits for its answer."""
        service = self._service
        seat: Seat | None = None
        if header.joint is None:
            self._permit = service.admission.reserve(header.payload_bytes + header.grad_bytes)
        else:
            place = self._place = service.joints.join(header, self._context.cancel)
            if isinstance(place, Kept):
                self._phase = "send"
                self._computed = time.monotonic()
                return place.answer
            seat = place
        try:
            staging = self._staging = Staging(header, service.staging)
        except Exception as error:
            if is_out_of_memory(error):
                raise OverloadedError("the server's host has no memory left for the request's tensors", 1.0) from None
            raise
        receive(staging)
        self._ended("receive", self._started)
        self._received = time.monotonic()
        self._phase = "queue" if seat is None else "joint"
        entry = Entry(staging.request(), header.loss, header.want_grad, self._deadline, staging)
        try:
            answer = self._answered(entry) if seat is None else self._joined(seat, entry, staging)
        except CancelledError:
            service.batcher.discard(entry.members[0])
            raise AbandonedError("the caller went away") from None
        except Exception:
            if self._phase == "queue" and entry.started is not None:
                self._ended("queue", self._queued, entry.started)
                self._phase, self._computing = "compute", entry.started
            raise
        finally:
            # An error's trace leads to this frame, and must not keep the tensors alive.
            del entry, staging, seat
        self._phase, self._computed = "send", time.monotonic()
        self._ended("queue", self._queued, answer.started)
        self._seconds.update(compute=answer.compute_seconds, copy=answer.copy_seconds)
        service.metrics.request_bytes.observe(header.payload_bytes)
        if self._run and (header.joint is None or header.joint.rank == 0):
            result = answer.result
            service.metrics.runs.observe(self._run, header.want_grad, result.loss, result.intersection, result.union)
        return answer

    def _answered(self, entry: Entry) -> Answer:
        if not self._context.add_callback(entry.cancel):
            raise AbandonedError("the caller went away")
        self._service.batcher.put(entry)
        return entry.wait()

    def _joined(self, seat: Seat, entry: Entry, staging: Staging) -> Answer:
        joints = self._service.joints
        joints.arrive(seat, entry)
        if not self._context.add_callback(lambda: joints.give_up(seat)):
            joints.give_up(seat)
        try:
            kept = joints.wait(seat, staging)
            self._place, self._staging = kept, None
            return kept.answer
        finally:
            if seat.group.complete is not None:
                self._joint_wait_seconds = max(0.0, seat.group.complete - self._received)
                self._seconds["joint"] = self._joint_wait_seconds
                self._phase = "queue"

    @property
    def _queued(self) -> float:
        return self._received + self._joint_wait_seconds

    def _ended(self, phase: str, begun: float, ended: float | None = None) -> None:
        self._seconds[phase] = max(0.0, (time.monotonic() if ended is None else ended) - begun)

    def place_fields(self, staging: Staging, header: wire.Request, request: framing.UnaryRequest) -> None:
        """Copies the payload of a message, or of shared memory, to its place.

        Raises:
            InvalidInput: a tensor has more or fewer bytes than the header declared.
            SessionLostError: the shared memory is not there.
        """
        fields: Sequence[tuple[str, Bytes, int]] = (
            ("logits", request.logits, header.logits.nbytes),
            ("labels", request.labels, header.labels.nbytes),
        )
        if header.shared is not None:
            for name, data, _ in fields:
                if len(data):
                    raise InvalidInput(name, f"got {len(data)} bytes beside shared_tensors; expected none")
            logits, labels, _ = self.shared_tensors(header)
            staging.receive([logits, labels])
            return
        for name, data, expected in fields:
            if len(data) != expected:
                raise InvalidInput(name, f"got {len(data)} bytes; expected {expected} for the declared type and shape")
        staging.receive([data for _, data, _ in fields])

    def shared_tensors(self, header: wire.Request) -> tuple[memoryview, memoryview, memoryview]:
        """Where the request's tensors lie in shared memory: logits, labels and gradient.

        Raises:
            SessionLostError: the session is not there.
            InvalidInput: they do not lie in a region of it.
        """
        for shared_memory in self._service.shared_memory:
            try:
                return shared_memory.tensors(header)
            except SessionLostError as error:
                lost = error
        if not self._service.shared_memory:
            raise InvalidInput("shared_tensors", "came, but this server shares no memory (--shared-memory)")
        raise lost

    def grad_bytes(self, answer: Answer) -> memoryview:
        """The gradient as it is sent; good until the call ends."""
        grad = answer.result.grad
        if grad is None:
            return memoryview(b"")
        return grad.reshape(-1).view(torch.uint8).numpy().data

    def response_header(self, header: wire.Request, answer: Answer) -> pb.ResponseHeader:
        result = answer.result
        timing = Timing(
            receive_seconds=self._received - self._started,
            queue_seconds=max(0.0, answer.started - self._received - self._joint_wait_seconds),
            compute_seconds=answer.compute_seconds,
            batch_requests=answer.batch_requests,
            joint_wait_seconds=self._joint_wait_seconds,
            copy_seconds=answer.copy_seconds,
        )
        grad = header.logits if header.want_grad else None
        return wire.Response(
            result.loss, result.terms, result.intersection, result.union, grad, answer.grad_scale, timing
        ).to_proto()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        admitted = self._permit is not None or self._place is not None
        if self._staging is not None:
            self._staging.release()
            self._staging = None
        if self._place is not None:
            self._service.joints.leave(self._place)
            self._place = None
        if self._permit is not None:
            self._permit.release()
        if self._inside:
            self._service.calls.release()
        if not self._context.is_active() and (error is None or type(error) in STATUS or kind is GeneratorExit):
            error = error if isinstance(error, ExpiredError) else self._gone()
        if admitted:
            self._observe(answered=error is None)
        if error is None:
            self._count(grpc.StatusCode.OK)
            return
        code = STATUS.get(type(error), grpc.StatusCode.INTERNAL)
        self._count(code)
        if reason := _rejection_reason(error):
            self._service.metrics.rejections.labels(reason).inc()
        if isinstance(error, AbandonedError | ExpiredError):
            reason = "expired" if isinstance(error, ExpiredError) else "cancelled"
            self._service.metrics.abandoned.labels(reason, self._phase).inc()
        if isinstance(error, StalledError):
            self._service.metrics.stalled.labels(self._phase).inc()
        if isinstance(error, OverloadedError):
            self._retry_after(error.retry_after_seconds)
        elif isinstance(error, TooLargeError):
            self._retry_after(-1)
        if kind is GeneratorExit:
            return
        text = str(error)
        request = {"peer": self._context.peer(), "run": self._run, "method": self._method, "loss": self._loss}
        if isinstance(error, InvalidInput | JointMismatchError | StalledError | TooLargeError):
            self._service.refusals.info("a request was refused", **request, reason=text)
        if code is grpc.StatusCode.INTERNAL:
            self._service.metrics.faults.inc()
            _log.error("unexpected fault", exc_info=error, extra={**request, **(self._trace or {})})
            text = "the server failed on this request; its log says why"
        self._context.abort(code, text.encode(errors="replace")[:_MAX_TEXT_BYTES].decode(errors="ignore"))

    def _observe(self, *, answered: bool) -> None:
        """Its time; if it failed, also that in its last phase: the slowest are among those whose callers gave up."""
        begun = {
            "receive": self._started,
            "joint": self._received,
            "queue": self._queued,
            "compute": self._computing,
            "send": self._computed,
        }
        self._ended(self._phase, begun[self._phase])
        seconds = time.monotonic() - self._started
        self._service.metrics.observe_request(self._seconds, seconds, answered, self._trace)

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
