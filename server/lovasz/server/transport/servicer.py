"""The loss service: its methods, and how gRPC reads and writes their messages."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

import grpc

from lovasz import wire
from lovasz.server.device.engine import Engine
from lovasz.server.device.hardware import hardware_name
from lovasz.server.errors import ServerError
from lovasz.server.observe.metrics import LOSS_METHODS, SHARED_MEMORY
from lovasz.server.transport.call import SERVICE_NAME, Call, Pipeline
from lovasz.server.transport.carrier import Carrier
from lovasz.server.transport.messages import Undecodable, decoded_stream, has_left, or_undecodable
from lovasz.server.transport.payload import UnaryPayload, grad_bytes
from lovasz.server.transport.receiving import Patience, Receiver
from lovasz.server.transport.sending import SendWatch
from lovasz.server.transport.shared_memory import SharedMemory
from lovasz.server.transport.status import CODES
from lovasz.server.transport.timed_calls import Limit, TimedCalls
from lovasz.spec import LOSS_KINDS, InvalidInput
from lovasz.v1 import loss_pb2 as pb
from lovasz.version import VERSION
from lovasz.wire import framing

_SUMS = ("cross_entropy+lovasz_softmax", "binary_cross_entropy+lovasz_hinge", "binary_cross_entropy+lovasz_sigmoid")
_LOSSES = (*LOSS_KINDS, *_SUMS, "unknown")
_WITHOUT_LOSS = (("AbortStep", "none"), ("LeaveRun", "none"), ("GetServerInfo", "none"))


@dataclass(frozen=True, kw_only=True)
class LossServicer:
    """Answers the methods of LossService.

    Attributes:
        shared_memory: one for each socket on which memory can be shared.
        readers: threads that read streams.
        patience: how long callers may keep a call waiting.
        headerless: the calls whose header has not come yet.
    """

    pipeline: Pipeline
    engine: Engine
    shared_memory: Sequence[SharedMemory]
    readers: Executor
    sending: SendWatch
    patience: Patience
    headerless: TimedCalls

    def __post_init__(self) -> None:
        # Counters begin at 0: Prometheus sees no rise in one that begins at its first failure.
        kinds = [*itertools.product(LOSS_METHODS, _LOSSES), *_WITHOUT_LOSS]
        for (method, loss), code in itertools.product(kinds, CODES):
            self.pipeline.metrics.requests.series(method, loss, code.name)

    def handler(self) -> grpc.GenericRpcHandler:
        """The methods, with messages read and written without protobuf's copies (``lovasz.wire.framing``)."""
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Compute": self._unary("Compute", self.compute, framing.UnaryRequest.decode, None),
            "ComputeStream": grpc.stream_stream_rpc_method_handler(
                self.compute_stream,
                request_deserializer=or_undecodable(framing.stream_message_decoder(pb.ComputeStreamRequest)),
                response_serializer=framing.encode_stream_message,
            ),
            "AbortStep": self._unary(
                "AbortStep",
                self.abort_step,
                pb.AbortStepRequest.FromString,
                pb.AbortStepResponse.SerializeToString,
            ),
            "LeaveRun": self._unary(
                "LeaveRun", self.leave_run, pb.LeaveRunRequest.FromString, pb.LeaveRunResponse.SerializeToString
            ),
            "GetServerInfo": self._unary(
                "GetServerInfo",
                lambda request, context, began: self.server_info(request, context),
                pb.GetServerInfoRequest.FromString,
                pb.GetServerInfoResponse.SerializeToString,
            ),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, methods)

    def _unary(
        self,
        name: str,
        method: Callable[[Any, grpc.ServicerContext, float], Any],
        decode: Callable[[bytes], Any],
        encode: Callable[[Any], bytes] | None,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """A method of one message, which is read here: gRPC would wait for it without a limit, on one of its threads.

        On the wire, a stream of one message is no different. gRPC does not tell how much of a message has come: a
        request has as long for header and payload together as in a stream.
        """
        seconds = self.patience.header_seconds + self.patience.payload_seconds
        limit = Limit("message", seconds, "--header-timeout and --payload-timeout") if name == "Compute" else None

        def answer(messages: Iterator[Any], context: grpc.ServicerContext) -> Any:
            began = time.monotonic()
            try:
                with self.pipeline.lanes.aside():
                    message = self.headerless.first(messages, context, limit)
            except ServerError as error:
                with Call(self.pipeline, name, context, began):
                    raise error
            return method(Undecodable(0) if message is None else message, context, began)

        return grpc.stream_unary_rpc_method_handler(
            answer, request_deserializer=or_undecodable(decode), response_serializer=encode
        )

    def compute(
        self,
        request: framing.UnaryRequest | Undecodable,
        context: grpc.ServicerContext,
        began: float | None = None,
    ) -> bytes:
        """Computes a request that comes in one message."""
        with Call(self.pipeline, "Compute", context, began) as call:
            call.enter()
            if isinstance(request, Undecodable):
                raise request.error("ComputeRequest")
            # Encoded here, as the gradient's memory is given back with the call.
            encoded = self._answer(call, request).encode()
            call.hand_over(len(encoded), self.sending)
            return encoded

    def compute_shared(self, header: pb.RequestHeader, carrier: Carrier) -> pb.ResponseHeader:
        """Computes a request that comes over the shared-memory socket."""
        with Call(self.pipeline, SHARED_MEMORY, carrier) as call:
            call.enter()
            if not header.HasField("shared_tensors"):
                raise InvalidInput("shared_tensors", "got none; expected where the tensors are in shared memory")
            return self._answer(call, framing.UnaryRequest(header, b"", b""), wire.MAX_PACKET_BYTES).header

    def _answer(
        self, call: Call, request: framing.UnaryRequest, max_header_bytes: float = math.inf
    ) -> framing.UnaryResponse:
        header = call.read_header(request.header)
        if header.max_answer_bytes > max_header_bytes:
            raise InvalidInput(
                "header",
                f"the header of its answer may have {header.max_answer_bytes} bytes; expected at most "
                f"{max_header_bytes:.0f} on the shared-memory socket: make this call with Compute",
            )
        tensors = UnaryPayload(header, request, self.shared_memory, self.pipeline.staging)
        answer = call.compute(header, tensors.receive, tensors.staging)
        grad = tensors.send_back(answer)
        return framing.UnaryResponse(call.response_header(header, answer), grad)

    def compute_stream(
        self, messages: Iterator[pb.ComputeStreamRequest | memoryview | Undecodable], context: grpc.ServicerContext
    ) -> Iterator[pb.ComputeStreamResponse | memoryview]:
        """Computes a request whose payload, like its gradient, comes in chunks."""
        self.pipeline.lanes.leave()
        with Call(self.pipeline, "ComputeStream", context) as call:
            call.enter()
            receiver = Receiver(
                decoded_stream(messages), self.readers.submit, self.patience, functools.partial(has_left, context)
            )
            try:
                with self.headerless.open(context) as opened:
                    message = opened.read(receiver.header)
                header = call.read_header(message)
                if header.shared is not None:
                    raise InvalidInput("shared_tensors", "came with ComputeStream; expected them with Compute alone")
                answer = call.compute(header, receiver.payload)
            finally:
                receiver.stop()
            first: list[pb.ComputeStreamResponse | memoryview]
            first = [pb.ComputeStreamResponse(header=call.response_header(header, answer))]
            yield from self.sending.watched(itertools.chain(first, wire.chunks([grad_bytes(answer)])), context)

    def abort_step(
        self, request: pb.AbortStepRequest | Undecodable, context: grpc.ServicerContext, began: float | None = None
    ) -> pb.AbortStepResponse:
        """Ends a joint step in which a rank cannot take part."""
        with Call(self.pipeline, "AbortStep", context, began) as call:
            call.enter()
            if isinstance(request, Undecodable):
                raise request.error("AbortStepRequest")
            abort = wire.Abort.from_proto(request)
            self.pipeline.joints.abort(replace(abort, joint=call.sealed(abort.joint)), address=call.address)
            return pb.AbortStepResponse()

    def leave_run(
        self, request: pb.LeaveRunRequest | Undecodable, context: grpc.ServicerContext, began: float | None = None
    ) -> pb.LeaveRunResponse:
        """Lets the other ranks of a run go on without one."""
        with Call(self.pipeline, "LeaveRun", context, began) as call:
            call.enter()
            if isinstance(request, Undecodable):
                raise request.error("LeaveRunRequest")
            leave = wire.Leave.from_proto(request)
            self.pipeline.joints.leave_run(replace(leave, joint=call.sealed(leave.joint)))
            return pb.LeaveRunResponse()

    def server_info(
        self, request: pb.GetServerInfoRequest | Undecodable, context: grpc.ServicerContext
    ) -> pb.GetServerInfoResponse:
        """Describes the server and its device. Whatever the request has in it does not matter."""
        device = pb.Device(
            name=str(self.engine.device),
            hardware=hardware_name(self.engine.device),
            healthy=self.engine.healthy,
            starting=self.engine.starting,
        )
        return pb.GetServerInfoResponse(
            version=VERSION,
            devices=[device],
            losses=LOSS_KINDS,
            max_message_bytes=wire.MAX_MESSAGE_BYTES,
            memory_budget_bytes=self.pipeline.admission.budget_bytes,
            max_requests=self.pipeline.admission.max_requests,
        )
