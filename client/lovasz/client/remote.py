"""A server as a target: small requests in one message, large ones in a stream or in shared memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from lovasz import spec, wire
from lovasz.client.connection import Connection
from lovasz.client.errors import (
    IncompatibleServerError,
    LossError,
    ServerUnavailableError,
)
from lovasz.client.memory import Memory, MemoryPool
from lovasz.client.options import ClientOptions, Transport
from lovasz.client.shared_memory import Region, SharedMemory, places
from lovasz.client.target import Device, ServerInfo, socket_path
from lovasz.client.tensors import AnyArray, Array, Outgoing, decode_grad, encode_labels, encode_logits, is_torch
from lovasz.spec import InvalidInput
from lovasz.spec.probabilities import LOOKS_OF_PROCESS
from lovasz.v1 import loss_pb2 as pb
from lovasz.wire import framing

UNARY_BYTES = 2 << 20
"""Requests with a larger payload are streamed: about where a stream becomes faster (measured on loopback, 2 cores)."""
SHARED_BYTES = 64 << 10
"""Requests with a larger payload go through shared memory if possible; smaller ones are as fast in a message."""


@dataclass(frozen=True)
class Call:
    """A request to a server, checked and encoded.

    Attributes:
        target: the server.
        request: all of the request but its payload.
        logits: the bytes that are sent.
        labels: the bytes that are sent.
        memory: the pooled memory that these bytes are in, where they are not in the caller's own arrays.
        region: the shared memory that they are in; None if the call does not use any.
        original: the logits as an array or a tensor.
    """

    target: RemoteTarget
    request: wire.Request
    logits: memoryview
    labels: memoryview
    memory: tuple[Memory, ...]
    region: Region | None
    original: Array

    def compute(self, timeout: float) -> spec.Result[Any]:
        """Computes it on the server within ``timeout`` seconds, retries included."""
        return self.target.compute(self, timeout)


Answer = tuple[wire.Response, npt.NDArray[Any]]
"""A response, and its gradient as it was sent (empty if none was wanted)."""


class RemoteTarget:
    """A server, reached by gRPC."""

    def __init__(self, target: str, options: ClientOptions) -> None:
        """Opens the channels, which connect at the first call.

        Raises:
            ValueError: the options demand shared memory, and the target is not a Unix socket.
        """
        path = socket_path(target)
        if options.transport is Transport.SHM:
            if path is None:
                raise ValueError(f"transport: got 'shm' with the target {target}; expected a target unix:/path")
            longest = wire.MAX_SOCKET_PATH_BYTES - len(wire.MEMORY_SUFFIX)
            if (length := len(os.fsencode(path))) > longest:
                raise ValueError(
                    f"transport: got 'shm' with a path of {length} bytes; expected at most {longest}, as "
                    f"{wire.MEMORY_SUFFIX} is appended to it"
                )
        self._name = target
        self._transport = options.transport
        self._wire_dtype = options.wire_dtype
        self._run = options.run
        self._connection = Connection(target, options)
        self._messages, self._streams = self._connection.messages, self._connection.streams
        self._retries = self._connection.retries
        self._call_unary = _unary(self._messages)
        self._call_shared = _unary(self._streams)
        self._call_stream = self._streams.stream_stream(
            _method("ComputeStream"),
            request_serializer=framing.encode_stream_message,
            response_deserializer=framing.stream_message_decoder(pb.ComputeStreamResponse),
        )
        self._call_info = self._messages.unary_unary(
            _method("GetServerInfo"),
            request_serializer=pb.GetServerInfoRequest.SerializeToString,
            response_deserializer=pb.GetServerInfoResponse.FromString,
        )
        self._call_abort = self._messages.unary_unary(
            _method("AbortStep"),
            request_serializer=pb.AbortStepRequest.SerializeToString,
            response_deserializer=pb.AbortStepResponse.FromString,
        )
        self._call_leave = self._messages.unary_unary(
            _method("LeaveRun"),
            request_serializer=pb.LeaveRunRequest.SerializeToString,
            response_deserializer=pb.LeaveRunResponse.FromString,
        )
        self._memory: MemoryPool[Memory] = MemoryPool(Memory)
        self._memory_path = None if path is None or self._transport is Transport.GRPC else path + wire.MEMORY_SUFFIX
        self._shared = None if self._memory_path is None else SharedMemory(self._memory_path)

    def prepare(
        self,
        logits: AnyArray,
        labels: AnyArray,
        loss: spec.WeightedSum,
        want_grad: bool,
        joint: wire.Joint | None,
        offsets: AnyArray | None,
    ) -> Call:
        scores, targets = encode_logits(logits, self._wire_dtype), encode_labels(labels)
        request = wire.Request.checked(
            loss, scores.spec, targets.spec, want_grad, joint=joint, run=self._run, offsets=offsets
        )
        if scores.dtype != "bfloat16" or is_torch(scores.source):
            LOOKS_OF_PROCESS.warn_of_probabilities(scores.source, loss)
        if self._shared is not None and self._is_shared(request):
            place = places(request)
            region = self._shared.regions.take(place.nbytes)
            sent = _written(scores, region, place.logits), _written(targets, region, place.labels)
            return Call(self, request, *sent, memory=(), region=region, original=scores.source)
        memory: list[Memory] = []

        def on_host(tensor: Outgoing) -> memoryview:
            array = tensor.in_place() if tensor.spec.nbytes else tensor.array()
            if array is not None:
                return wire.as_bytes(array)
            memory.append(self._memory.take(tensor.spec.nbytes))
            return _written(tensor, memory[-1], 0)

        return Call(self, request, on_host(scores), on_host(targets), tuple(memory), None, scores.source)

    def _is_shared(self, request: wire.Request) -> bool:
        if self._memory_path is None or request.payload_bytes <= SHARED_BYTES:
            return False
        return self._transport is Transport.SHM or os.path.exists(self._memory_path)

    def compute(self, call: Call, timeout: float) -> spec.Result[Any]:
        self._connection.check_open()
        with self._grpc_errors_translated():
            if call.region is not None:
                response, grad = self._through_region(call, call.region, timeout)
            else:
                response, grad = self._in_messages(call, timeout)
        return spec.Result(
            loss=response.loss,
            grad=None if response.grad is None else decode_grad(grad, response, call.original, self._float32_array),
            terms=response.terms,
            intersection=response.intersection,
            union=response.union,
            timing=response.timing,
            ranks=response.ranks,
        )

    def abort_step(self, abort: wire.Abort, timeout: float) -> None:
        with self._grpc_errors_translated():
            self._call_abort(abort.to_proto(), timeout=timeout, metadata=self._connection.metadata(abort.joint))

    def leave_run(self, leave: wire.Leave, timeout: float) -> None:
        message, metadata = leave.to_proto(), self._connection.metadata
        with self._grpc_errors_translated():
            self._retries.call(
                lambda left: self._call_leave(message, timeout=left, metadata=metadata(leave.joint)), timeout
            )

    def server_info(self, timeout: float) -> ServerInfo:
        with self._grpc_errors_translated():
            info = self._call_info(pb.GetServerInfoRequest(), timeout=timeout, metadata=self._connection.metadata(None))
        return ServerInfo(
            version=info.version,
            devices=tuple(
                Device(device.name, device.hardware, device.healthy, device.starting) for device in info.devices
            ),
            losses=tuple(info.losses),
            memory_budget_bytes=info.memory_budget_bytes,
            max_requests=info.max_requests,
        )

    @contextmanager
    def _grpc_errors_translated(self) -> Iterator[None]:
        """Turns what gRPC raises inside into the client's errors."""
        try:
            with self._connection.errors_translated():
                yield
        except _WrongAnswer as error:
            raise IncompatibleServerError(f"{self._name}: the answer does not fit the request: {error}") from None

    def close(self) -> None:
        self._connection.close()
        self._memory.close()
        if self._shared is not None:
            self._shared.close()

    def _in_messages(self, call: Call, timeout: float) -> Answer:
        send = self._unary if call.request.payload_bytes <= UNARY_BYTES else self._stream
        try:
            return self._retries.call(lambda left: send(call, left), timeout)
        finally:
            for memory in call.memory:
                self._memory.give(memory)

    def _unary(self, call: Call, timeout: float) -> Answer:
        request = framing.UnaryRequest(call.request.to_proto(), call.logits, call.labels)
        answer = self._call_unary(request, timeout=timeout, metadata=self._connection.metadata(call.request.joint))
        return self._received(answer.header, iter([answer.grad]), call)

    def _stream(self, call: Call, timeout: float) -> Answer:
        answers = self._call_stream(
            _messages(call), timeout=timeout, metadata=self._connection.metadata(call.request.joint)
        )
        try:
            first = next(answers, None)
            if not isinstance(first, pb.ComputeStreamResponse) or not first.HasField("header"):
                raise _WrongAnswer("it does not begin with a header")
            return self._received(first.header, _chunks(answers), call)
        finally:
            answers.cancel()  # No effect on a call that has ended.

    def _received(self, header: pb.ResponseHeader, chunks: Iterable[framing.Bytes], call: Call) -> Answer:
        with _misfit_is_wrong_answer():
            response = wire.Response.from_proto(header, call.request)
            grad = np.empty(0, np.float32)
            if response.grad is not None:
                grad = self._memory.new(response.grad.shape, response.grad.dtype.numpy)
            wire.Assembly([wire.as_bytes(grad)]).add_all(chunks)
        return response, grad

    def _through_region(self, call: Call, region: Region, timeout: float) -> Answer:
        """The region is reused only after success: after a failure the server may still be writing to it."""
        assert self._shared is not None
        try:
            try:
                response = self._retries.call(lambda left: self._in_shared_memory(call, region, left), timeout)
            except LossError:  # The server takes no shared memory.
                if self._transport is Transport.SHM:
                    raise
                response, grad = self._retries.call(lambda left: self._stream(call, left), timeout)
                self._shared.regions.give(region)
                return response, grad
        except BaseException:
            region.close()
            raise
        if response.grad is None:
            self._shared.regions.give(region)
            return response, np.empty(0, np.float32)
        offset = places(call.request).grad
        return response, self._shared.regions.lend(region, offset, response.grad.shape, response.grad.dtype.numpy)

    def _in_shared_memory(self, call: Call, region: Region, timeout: float) -> wire.Response:
        assert self._shared is not None
        place = places(call.request)
        try:
            session = self._shared.share(region, timeout)
        except ServerUnavailableError:
            self._call_info(
                pb.GetServerInfoRequest(), timeout=timeout, metadata=self._connection.metadata(None)
            )  # If no server answers, its error is raised.
            raise
        shared = wire.SharedTensors(session, region.number, place.logits, place.labels, place.grad)
        header = replace(call.request, shared=shared).to_proto()
        try:
            message = framing.UnaryRequest(header, b"", b"")
            answer = self._call_shared(message, timeout=timeout, metadata=self._connection.metadata(call.request.joint))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:  # It may have restarted and not know the session.
                self._shared.forget()
            raise
        with _misfit_is_wrong_answer():
            return wire.Response.from_proto(answer.header, call.request)

    def _float32_array(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        return self._memory.new(shape, np.dtype(np.float32))


class _WrongAnswer(Exception):
    """The answer does not fit the request; the text says why."""


@contextmanager
def _misfit_is_wrong_answer() -> Iterator[None]:
    """Turns an InvalidInput, raised inside by reading an answer, into a _WrongAnswer."""
    try:
        yield
    except InvalidInput as error:
        raise _WrongAnswer(str(error)) from None


def _method(name: str) -> str:
    return f"/{pb.DESCRIPTOR.services_by_name['LossService'].full_name}/{name}"


def _unary(channel: grpc.Channel) -> Callable[..., framing.UnaryResponse]:
    return channel.unary_unary(
        _method("Compute"),
        request_serializer=framing.UnaryRequest.encode,
        response_deserializer=framing.UnaryResponse.decode,
    )


def _written(tensor: Outgoing, memory: Memory, offset: int) -> memoryview:
    """The tensor's bytes, written to memory."""
    array = memory.array(offset, tensor.spec.shape, tensor.spec.dtype.numpy)
    tensor.write(array)
    return wire.as_bytes(array)


def _messages(call: Call) -> Iterator[pb.ComputeStreamRequest | memoryview]:
    """The messages of a streamed request: its header, then the chunks of its payload."""
    yield pb.ComputeStreamRequest(header=call.request.to_proto())
    yield from wire.chunks([call.logits, call.labels])


def _chunks(answers: Iterable[pb.ComputeStreamResponse | memoryview]) -> Iterator[memoryview]:
    """The chunks of a streamed answer, after its header."""
    for message in answers:
        if not isinstance(message, memoryview):
            raise _WrongAnswer("a message without a chunk came after the header")
        yield message
