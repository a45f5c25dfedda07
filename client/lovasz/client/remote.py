"""A server as a target: small requests in one message, large ones in a stream or in shared memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import grpc
import numpy as np
import numpy.typing as npt

from lovasz import spec, wire
from lovasz.client.devices import Devices
from lovasz.client.errors import (
    CallCancelledError,
    IncompatibleServerError,
    InvalidInputError,
    LossError,
    ServerUnavailableError,
    from_rpc_error,
)
from lovasz.client.load_balancing import HASH_PROBLEM, RUN_KEY, LoadBalancing, cannot_hash, service_config
from lovasz.client.memory import Memory, MemoryPool
from lovasz.client.options import ClientOptions, Transport
from lovasz.client.proxy import enabled_option, remark
from lovasz.client.retry import Retries
from lovasz.client.shared_memory import Shared, SharedMemory, places
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

_OPTIONS = (
    # Each channel gets its own connections; by default gRPC shares one among all clients of a process.
    ("grpc.use_local_subchannel_pool", 1),
    # lovasz.client.retry repeats calls instead.
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.http2.max_frame_size", wire.MAX_FRAME_BYTES),
    *wire.KEEPALIVE_OPTIONS,
    # By default a client may take two minutes to reconnect to a server that restarted.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)
"""gRPC's options for every channel."""


@dataclass(frozen=True)
class Call:
    """A request to a server, checked and encoded.

    Attributes:
        target: the server.
        request: all of the request but its payload.
        logits: the bytes that are sent, unless ``region`` has them.
        labels: likewise.
        memory: the pooled memory that these bytes are in, where they are not in the caller's own arrays.
        region: the shared memory that the tensors are in; None if the call does not use any.
        original: the logits as an array or a tensor.
    """

    target: RemoteTarget
    request: wire.Request
    logits: memoryview
    labels: memoryview
    memory: tuple[Memory, ...]
    region: Shared | None
    original: Array

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The call's gRPC metadata: gRPC and proxies find the calls of a run by it."""
        return _metadata(self.request.joint)

    def compute(self, timeout: float) -> spec.Result[Any]:
        """Computes it on the server within ``timeout`` seconds, retries included."""
        return self.target.compute(self, timeout)


Answer = tuple[wire.Response, Array]
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
        self._load_balancing = options.load_balancing if path is None else None
        self._closed = False
        self._http_proxy = options.http_proxy
        channel_options = (
            *_OPTIONS,
            enabled_option(target, options.http_proxy),
            ("grpc.service_config", service_config(self._load_balancing)),
        )
        self._messages = grpc.insecure_channel(target, options=channel_options)
        # Large transfers have their own connection, so that they delay no small request.
        self._streams = grpc.insecure_channel(target, options=channel_options)
        self._retries = Retries()
        self._call_unary = _unary(self._messages)
        self._call_shared = _unary(self._streams)
        self._call_stream = self._streams.stream_stream(
            _method("ComputeStream"),
            request_serializer=framing.encode_stream_message,
            response_deserializer=framing.stream_message_decoder(pb.ComputeStreamResponse),
        )
        self._call_info = _plain(self._messages, "GetServerInfo")
        self._call_abort = _plain(self._messages, "AbortStep")
        self._call_leave = _plain(self._messages, "LeaveRun")
        self._memory: MemoryPool[Memory] = MemoryPool(Memory)
        self._memory_path = None if path is None or self._transport is Transport.GRPC else path + wire.MEMORY_SUFFIX
        self._shared = None if self._memory_path is None else SharedMemory(self._memory_path)
        self._devices = None if self._shared is None else Devices(self._shared, options.timeout)

    def prepare(
        self,
        logits: AnyArray,
        labels: AnyArray,
        loss: spec.WeightedSum,
        want_grad: bool,
        joint: wire.Joint | None,
        offsets: AnyArray | None,
    ) -> Call:
        scores = encode_logits(logits, self._wire_dtype)

        def checked(targets: Outgoing) -> wire.Request:
            request = wire.Request.checked(
                loss, scores.spec, targets.spec, want_grad, joint=joint, run=self._run, offsets=offsets
            )
            if scores.dtype != "bfloat16" or is_torch(scores.source):
                LOOKS_OF_PROCESS.warn_of_probabilities(scores.source, loss)
            return request

        if self._devices is not None and self._is_offered() and self._devices.may_take(logits):
            targets = encode_labels(labels, narrow=False)
            request = checked(targets)
            region = self._devices.region(logits, places(request).nbytes)
            if region is not None:
                return self._in_region(region, request, scores, targets)
        targets = encode_labels(labels)
        request = checked(targets)
        if self._shared is not None and request.payload_bytes > SHARED_BYTES and self._is_offered():
            return self._in_region(self._shared.regions.take(places(request).nbytes), request, scores, targets)
        memory: list[Memory] = []

        def on_host(tensor: Outgoing) -> memoryview:
            array = tensor.in_place() if tensor.spec.nbytes else tensor.array()
            if array is not None:
                return wire.as_bytes(array)
            memory.append(self._memory.take(tensor.spec.nbytes))
            return memory[-1].write(0, tensor)

        return Call(self, request, on_host(scores), on_host(targets), tuple(memory), None, scores.source)

    def _in_region(self, region: Shared, request: wire.Request, scores: Outgoing, targets: Outgoing) -> Call:
        place = places(request)
        try:
            sent = region.write(place.logits, scores), region.write(place.labels, targets)
        except BaseException:
            region.close()
            raise
        return Call(self, request, *sent, memory=(), region=region, original=scores.source)

    def _is_offered(self) -> bool:
        """Whether the server may take shared memory."""
        return self._memory_path is not None and (self._transport is Transport.SHM or os.path.exists(self._memory_path))

    def compute(self, call: Call, timeout: float) -> spec.Result[Any]:
        if self._closed:
            raise CallCancelledError(f"{self._name}: the client was closed")
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
            self._call_abort(abort.to_proto(), timeout=timeout, metadata=_metadata(abort.joint))

    def leave_run(self, leave: wire.Leave, timeout: float) -> None:
        message, metadata = leave.to_proto(), _metadata(leave.joint)
        with self._grpc_errors_translated():
            self._retries.call(lambda left: self._call_leave(message, timeout=left, metadata=metadata), timeout)

    def server_info(self, timeout: float) -> ServerInfo:
        with self._grpc_errors_translated():
            info = self._call_info(pb.GetServerInfoRequest(), timeout=timeout)
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
            yield
        except grpc.RpcError as error:
            if self._closed:
                raise CallCancelledError(f"{self._name}: the client was closed") from None
            if self._load_balancing is LoadBalancing.RING_HASH and cannot_hash(error):
                raise InvalidInputError("load_balancing", HASH_PROBLEM) from None
            unreachable = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            raise from_rpc_error(
                error, self._name, remark(self._name, self._http_proxy) if unreachable else ""
            ) from None
        except ValueError:
            if self._closed:  # gRPC raises it for a channel that was closed meanwhile.
                raise CallCancelledError(f"{self._name}: the client was closed") from None
            raise
        except _WrongAnswer as error:
            raise IncompatibleServerError(f"{self._name}: the answer does not fit the request: {error}") from None

    def close(self) -> None:
        self._closed = True
        self._retries.close()
        self._messages.close()
        self._streams.close()
        self._memory.close()
        if self._devices is not None:
            self._devices.close()
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
        answer = self._call_unary(request, timeout=timeout, metadata=call.metadata)
        return self._received(answer.header, iter([answer.grad]), call)

    def _stream(self, call: Call, timeout: float) -> Answer:
        answers = self._call_stream(_messages(call), timeout=timeout, metadata=call.metadata)
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

    def _through_region(self, call: Call, region: Shared, timeout: float) -> Answer:
        """The region is reused only after success: after a failure the server may still be writing to it."""
        assert self._shared is not None
        try:
            try:
                response = self._retries.call(lambda left: self._in_shared_memory(call, region, left), timeout)
            except LossError:  # The server takes no shared memory.
                if self._transport is Transport.SHM:
                    raise
                tensors = call.request.logits, call.request.labels
                logits, labels = map(region.bytes, places(call.request), (tensor.nbytes for tensor in tensors))
                sent = replace(call, logits=logits, labels=labels)
                response, grad = self._retries.call(lambda left: self._stream(sent, left), timeout)
                region.give_back()
                return response, grad
        except BaseException:
            region.close()
            raise
        if response.grad is None:
            region.give_back()
            return response, np.empty(0, np.float32)
        return response, region.lend(places(call.request).grad, response.grad)

    def _in_shared_memory(self, call: Call, region: Shared, timeout: float) -> wire.Response:
        assert self._shared is not None
        place = places(call.request)
        region.complete()
        try:
            session = self._shared.share(region, timeout)
        except ServerUnavailableError:
            self._call_info(pb.GetServerInfoRequest(), timeout=timeout)  # If no server answers, its error is raised.
            raise
        shared = wire.SharedTensors(session, region.number, place.logits, place.labels, place.grad)
        header = replace(call.request, shared=shared).to_proto()
        try:
            message = framing.UnaryRequest(header, b"", b"")
            answer = self._call_shared(message, timeout=timeout, metadata=call.metadata)
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


def _metadata(joint: wire.Joint | None) -> tuple[tuple[str, str], ...]:
    return () if joint is None else ((RUN_KEY, quote(joint.run, safe="")),)


def _method(name: str) -> str:
    return f"/{pb.DESCRIPTOR.services_by_name['LossService'].full_name}/{name}"


def _unary(channel: grpc.Channel) -> Callable[..., framing.UnaryResponse]:
    return channel.unary_unary(
        _method("Compute"),
        request_serializer=framing.UnaryRequest.encode,
        response_deserializer=framing.UnaryResponse.decode,
    )


def _plain(channel: grpc.Channel, name: str) -> Callable[..., Any]:
    """A method whose messages protobuf reads and writes."""
    return channel.unary_unary(
        _method(name),
        request_serializer=getattr(pb, f"{name}Request").SerializeToString,
        response_deserializer=getattr(pb, f"{name}Response").FromString,
    )


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
