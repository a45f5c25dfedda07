"""One call of the loss service: what it holds on its way, how long it takes, and how it ends."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import grpc

from lovasz import wire
from lovasz.server.errors import (
    AbandonedError,
    ExpiredError,
    NoBytesLeftError,
    ServerError,
    TooLargeError,
)
from lovasz.server.memory.any_staging import AnyStaging
from lovasz.server.memory.device_staging import DeviceStaging
from lovasz.server.memory.exhaustion import is_out_of_memory
from lovasz.server.memory.pool import StagingPool
from lovasz.server.memory.staging import Staging
from lovasz.server.observe.logs import Sparingly
from lovasz.server.observe.metrics import Metrics, Phase, unread_loss
from lovasz.server.observe.tracing import EndedCall, SpanRecorder, exemplar
from lovasz.server.schedule.admission import Admission, Permit
from lovasz.server.schedule.batcher import Batcher
from lovasz.server.schedule.job import Answer, Caller, Job, cost_of
from lovasz.server.schedule.joint.group import Seat
from lovasz.server.schedule.joint.kept import Kept
from lovasz.server.schedule.joint.table import JointTable
from lovasz.server.transport.call_limit import CallLimit
from lovasz.server.transport.carrier import Carrier
from lovasz.server.transport.clock import CallClock
from lovasz.server.transport.identity import Identity
from lovasz.server.transport.lanes import Lanes
from lovasz.server.transport.sending import SendWatch
from lovasz.server.transport.status import FAULT, FAULT_TEXT, STATUS, Status, status_of
from lovasz.server.transport.threads import too_many_calls
from lovasz.spec import InvalidInput
from lovasz.v1 import loss_pb2 as pb

_log = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["LossService"].full_name
_RETRY_SECONDS = 1.0
"""The delay that callers are told to wait before a retry, unless a better one is known."""
_MAX_TEXT_BYTES = 2000
"""The longest error text in UTF-8 bytes: gRPC may triple it, and metadata is limited to 8 KiB."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The stages that each request goes through, and the metrics, limits and log that a call needs.

    Attributes:
        compute_now: computes a job in the thread that brings it, if the device is free; False: it has to be queued.
        is_quick: whether a job of this cost takes little of the device's time: then its call stays in its lane,
        has_large_job: unless it may have to wait for one that takes longer.
        lanes: which calls go on while several connections send requests.
        calls: how many may be in the loss service at a time.
        max_segments: the most segments in one request.
        run_key: for ``Identity.sealed``.
        spans: where spans of calls go; None: nowhere.
        refusals: logs refused requests, a few of them where there are many.
    """

    admission: Admission
    batcher: Batcher
    compute_now: Callable[[Job], bool]
    is_quick: Callable[[int], bool]
    has_large_job: Callable[[], bool]
    joints: JointTable
    staging: StagingPool
    metrics: Metrics
    calls: CallLimit
    max_segments: int
    lanes: Lanes
    run_key: bytes = field(default_factory=lambda: os.urandom(32))
    spans: SpanRecorder | None = None
    refusals: Sparingly = field(default_factory=lambda: Sparingly(_log))


class Call:
    """One call, from its header to its last byte. At the end of its ``with``, it gives back all that it holds."""

    def __init__(self, pipeline: Pipeline, method: str, context: Carrier, began: float | None = None) -> None:
        """Begins the call.

        Args:
            began: when it began (``time.monotonic``) if its message has been read already; None: now.
        """
        self._pipeline = pipeline
        self._method = method
        self._context = context
        self._identity = Identity.of(context)
        self._clock = CallClock(began)
        self._loss = unread_loss(method)
        self._run = ""
        self._inside = False
        self._permit: Permit | None = None
        self._place: Seat | Kept | None = None
        self._staging: AnyStaging | None = None
        self._handed_over: tuple[int, SendWatch] | None = None
        remaining = context.time_remaining()
        self._deadline = None if remaining is None else time.monotonic() + remaining
        self._trace = exemplar(context.invocation_metadata())

    def __enter__(self) -> Call:
        return self

    def enter(self) -> None:
        """Goes on if not too many calls do.

        Raises:
            OverloadedError: too many calls are open; some may not have reached admission yet.
        """
        self._inside = self._pipeline.calls.take()
        if not self._inside:
            raise too_many_calls()

    def read_header(self, message: pb.RequestHeader) -> wire.Request:
        """Parses the header.

        Raises:
            InvalidInput: a value in it is invalid.
            TooLargeError: the computation would take too long.
        """
        try:
            header = wire.Request.from_proto(message)
            self._check_segments(header)
        except (InvalidInput, TooLargeError) as error:
            if message.HasField("joint"):
                with suppress(InvalidInput, ServerError):  # It may have no place in the step.
                    joint = self.sealed(wire.Joint.from_proto(message.joint))
                    self._abort_step(joint, message.want_grad, error)
            raise
        if header.joint is not None:
            header = header.placed(header.shared, self.sealed(header.joint))
        self._loss = header.loss.kind
        self._run = header.run or ("" if header.joint is None else header.joint.run)
        return header

    def sealed(self, joint: wire.Joint) -> wire.Joint:
        """A rank's place as ``JointTable`` takes it: its secret replaced by the owner of the run."""
        return self._identity.sealed(joint, self._pipeline.run_key)

    @property
    def address(self) -> str:
        """Where the caller is, as far as that tells callers apart."""
        return self._identity.connection

    def _check_segments(self, header: wire.Request) -> None:
        most = self._pipeline.max_segments
        if header.segments > most:
            raise TooLargeError(
                f"the request has {header.segments} segments (classes x groups, over all Lovász terms, and "
                f"{wire.IMAGE_SEGMENTS} for each image of offsets); the server computes {most} at most (--max-segments)"
            )

    def compute(
        self, header: wire.Request, receive: Callable[[Any], None], staging_type: type[AnyStaging] = Staging
    ) -> Answer:
        """Takes room, receives the payload, queues the request and waits for its answer.

        Args:
            receive: lets a staging of this type have the payload.

        Raises:
            AbandonedError: the caller went away.
        """
        seat: Seat | None = None
        cost = cost_of(header.layout.elements, header.segments)
        weight = self._pipeline.batcher.weight_of(self._identity.tenant(header)) if self._identity.name else 1.0
        self._pipeline.lanes.see(weight)
        if not self._stays_in_lane(header, cost, weight):
            self._pipeline.lanes.leave()
        if not self._context.is_active():  # Its rank may have come again with another call meanwhile.
            raise AbandonedError
        if header.joint is None:
            name, who = self._identity
            self._permit = self._pipeline.admission.reserve(header.tensor_bytes, name=name, who=who)
        else:
            joints = self._pipeline.joints
            place = self._place = joints.join(header, self._context.cancel, self.address, self._identity.name)
            if isinstance(place, Kept):
                self._clock.skip_to(Phase.SEND)
                return place.answer
            seat = place
        staging = self._staging = self._new_staging(header, staging_type)
        try:
            receive(staging)
        except InvalidInput as error:
            if seat is not None and self._context.is_active():  # A caller that goes away takes its memory with it.
                self._abort_step(seat.joint, header.want_grad, error, seat)
            raise
        self._clock.enter(Phase.QUEUE if seat is None else Phase.JOINT)
        rank, tenant = 0 if seat is None else seat.joint.rank, self._identity.tenant(header)
        caller = Caller(staging.request(), cost, self._deadline, staging, rank=rank, tenant=tenant)
        try:
            answer = self._alone(caller, header) if seat is None else self._joined(seat, caller, staging)
        except Exception:
            self._clock.failed(caller.started)
            raise
        finally:
            # An error's trace leads to this frame, and must not keep the tensors alive.
            del caller, staging, seat
        self._clock.answered(answer)
        self._observe_answer(header, answer)
        return answer

    def _stays_in_lane(self, header: wire.Request, cost: int, weight: float) -> bool:
        """Whether the interpreter is what its callers share, and not other ranks, the device, or it by weights."""
        return header.joint is None and self._pipeline.is_quick(cost) and weight <= 1

    def _abort_step(self, joint: wire.Joint, want_grad: bool, error: Exception, seat: Seat | None = None) -> None:
        """Tells the other ranks of a joint step that this one is refused before the step is complete."""
        self._pipeline.joints.abort(wire.Abort(joint, want_grad, str(error)), seat, self.address)

    def _new_staging(self, header: wire.Request, staging_type: type[AnyStaging]) -> AnyStaging:
        pool = self._pipeline.staging
        try:
            return staging_type(header, pool)
        except Exception as error:
            if is_out_of_memory(error):
                where = pool.device if staging_type is DeviceStaging else "host"
                text = f"the server's {where} has no memory left for the request's tensors"
                raise NoBytesLeftError(text, _RETRY_SECONDS) from None
            raise

    def _alone(self, caller: Caller, header: wire.Request) -> Answer:
        """Queues a job of one caller, and waits."""
        job = Job((caller,), header.loss, header.want_grad)
        if not self._context.add_callback(lambda: job.leave(caller)):
            raise AbandonedError
        if not self._pipeline.compute_now(job):
            if self._pipeline.has_large_job():  # Others of its connection come to the queue meanwhile.
                self._pipeline.lanes.leave()
            self._pipeline.batcher.put(job)
        try:
            return caller.wait()
        except CancelledError:
            self._pipeline.batcher.discard(job)
            raise AbandonedError from None

    def _joined(self, seat: Seat, caller: Caller, staging: AnyStaging) -> Answer:
        """Waits for the other ranks of the step, and for their job."""
        joints = self._pipeline.joints
        joints.arrive(seat, caller)
        if not self._context.add_callback(lambda: joints.give_up(seat)):
            joints.give_up(seat)
        try:
            kept = joints.wait(seat, staging)
            self._place, self._staging = kept, None
            return kept.answer
        finally:
            if seat.completed is not None:
                self._clock.enter(Phase.QUEUE, seat.completed)

    def response_header(self, header: wire.Request, answer: Answer) -> pb.ResponseHeader:
        """What is sent before the gradient."""
        result = answer.result
        grad = header.logits if header.want_grad else None
        return wire.Response(
            result.loss,
            result.terms,
            result.intersection,
            result.union,
            grad,
            answer.grad_scale,
            self._clock.timing(answer),
            answer.ranks,
            "" if header.joint is None else self._pipeline.joints.warning(header.joint),
        ).to_proto()

    def hand_over(self, nbytes: int, sending: SendWatch) -> None:
        """The answer goes to gRPC in one message of this size once the ``with`` has ended."""
        self._handed_over = nbytes, sending

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        admitted = self._permit is not None or self._place is not None
        self._give_back()
        if not self._context.is_active() and (error is None or type(error) in STATUS or kind is GeneratorExit):
            is_known = isinstance(error, ExpiredError) or (isinstance(error, ServerError) and error.was_sent)
            error = error if is_known else self._gone()
        if admitted:
            # If the call failed, its last phase counts, too: the slowest calls are among those whose callers gave up.
            seconds = self._clock.stop()
            self._pipeline.metrics.observe_request(self._clock.seconds, seconds, error is None, self._trace)
        if error is None:
            self._count(grpc.StatusCode.OK)
            return
        status = status_of(error)
        self._count_failure(error, status)
        if kind is not GeneratorExit:  # gRPC closes a stream whose call has ended.
            self._abort(error, status)

    def _give_back(self) -> None:
        if self._staging is not None:
            self._staging.release()
            self._staging = None
        if self._handed_over is None:
            self._give_back_room()
        else:
            nbytes, sending = self._handed_over
            sending.hand_over(nbytes, self._context, self._give_back_room)

    def _give_back_room(self) -> None:
        if self._place is not None:
            self._pipeline.joints.leave(self._place)
            self._place = None
        if self._permit is not None:
            self._permit.release()
        if self._inside:
            self._pipeline.calls.give_back()

    def _gone(self) -> ServerError:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return ExpiredError("the deadline passed before the answer was sent")
        return AbandonedError()

    def _observe_answer(self, header: wire.Request, answer: Answer) -> None:
        metrics = self._pipeline.metrics
        metrics.observe_answer(header.payload_bytes)
        if self._run and answer.is_first:
            result = answer.result
            metrics.runs.observe(self._run, header.want_grad, result.loss, result.intersection, result.union)

    def _count(self, code: grpc.StatusCode) -> None:
        metrics = self._pipeline.metrics
        metrics.count_request(self._method, self._loss, code.name)
        if self._identity.name:
            metrics.count_caller(self._identity.name, code.name)
        if self._pipeline.spans is not None:
            clock, seconds = self._clock, self._clock.seconds
            ended = EndedCall(
                name=f"{SERVICE_NAME}/{self._method}",
                metadata=self._context.invocation_metadata(),
                began=clock.started,
                phases=[(phase.value, clock.began[phase], clock.began[phase] + seconds[phase]) for phase in seconds],
                code=code.name,
                attributes={"loss": self._loss, "run": self._run, "caller": self._identity.name},
            )
            self._pipeline.spans.record(ended)

    def _count_failure(self, error: BaseException, status: Status) -> None:
        metrics, phase = self._pipeline.metrics, self._clock.phase.value
        self._count(status.code)
        if status.rejection is not None:
            metrics.rejections.labels(status.rejection.value).inc()
        if status.abandonment is not None:
            metrics.abandoned.labels(status.abandonment.value, phase).inc()
        if status.stalled and not (isinstance(error, ServerError) and error.was_sent):  # It counts where it is sent.
            metrics.stalled.labels(phase).inc()

    def _abort(self, error: BaseException, status: Status) -> None:
        """Logs the error if need be, and ends the call with it."""
        text = str(error).encode(errors="replace")[:_MAX_TEXT_BYTES].decode(errors="ignore")
        request = {**self._identity.fields, "run": self._run, "method": self._method, "loss": self._loss}
        if status.logged:
            self._pipeline.refusals.info("a request was refused", **request, reason=text)
        if status is FAULT:
            self._pipeline.metrics.faults.inc()
            _log.error("unexpected fault", exc_info=error, extra={**request, **(self._trace or {})})
            text = FAULT_TEXT
        if isinstance(error, ServerError) and error.retry_after_milliseconds is not None:
            self._context.set_trailing_metadata(((wire.PUSHBACK_KEY, str(error.retry_after_milliseconds)),))
        self._context.abort(status.code, text)
