"""A server as the target of calls: small requests in one message, large ones in a stream or in shared memory."""

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
from lovasz.client.client import Device, ServerInfo
from lovasz.client.errors import (
    CallCancelledError,
    IncompatibleServerError,
    InvalidInputError,
    LossError,
    ServerUnavailableError,
    from_rpc_error,
)
from lovasz.client.memory import Memory, MemoryPool
from lovasz.client.retry import RUN_KEY, Retries, service_config
from lovasz.client.shared_memory import Region, SharedMemory, places
from lovasz.client.tensors import Array, Outgoing, decode_grad, encode_labels, encode_logits
from lovasz.spec import InvalidInput
from lovasz.v1 import loss_pb2 as pb
from lovasz.wire import framing

UNARY_BYTES = 2 << 20
"""Requests whose payload is larger are streamed: about where that gets faster (measured on loopback, 2 cores)."""
SHARED_BYTES = 64 << 10
"""Requests whose payload is larger go through shared memory where it can be had; others are as fast in a message."""

_OPTIONS = (
    # Connections of its own for each channel; otherwise gRPC lets all clients of a process share one.
    ("grpc.use_local_subchannel_pool", 1),
    # Calls are made again by lovasz.client.retry.
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.http2.max_frame_size", wire.MAX_FRAME_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Reconnecting to a server that was restarted should not wait for gRPC's default of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)

_UNIX = "unix:"

_NO_HASH = "hash attribute not present"
"""The end of every call whose channel has been told to hash, but not by what: gRPC's text, with INTERNAL."""
_HASH_PROBLEM = (
    "got 'ring_hash', which gRPC does not carry out here; expected the environment variable "
    "GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY=true, set before the client is opened, and grpcio 1.70 or newer "
    f"(it is {grpc.__version__})"
)


@dataclass(frozen=True)
class Call:
    """A request, encoded and checked.

    Attributes:
        logits: the bytes that are sent.
        labels: the bytes that are sent.
        memory: what they lie in, if that is not the caller's own.
        original: the logits as they came.
    """

    request: wire.Request
    logits: memoryview
    labels: memoryview
    memory: tuple[Memory, ...]
    original: Array

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What the call says beside the request: by this, gRPC and proxies know the calls of a run."""
        joint = self.request.joint
        return () if joint is None else ((RUN_KEY, quote(joint.run, safe="")),)


Received = tuple[wire.Response, npt.NDArray[Any]]
"""An answer, and its gradient (empty if none was wanted)."""


class RemoteTarget:
    """A server behind gRPC."""

    def __init__(
        self, target: str, transport: str, wire_dtype: str | None, load_balancing: str | None = None, run: str = ""
    ) -> None:
        """
        Raises:
            ValueError: shared memory was asked for, and the target is no Unix socket.
        """
        path = target.removeprefix(_UNIX).removeprefix("//") if target.startswith(_UNIX) else None
        if transport == "shm" and path is None:
            raise ValueError(f"transport: got 'shm' with the target {target}; expected a target unix:/path")
        self._name = target
        self._transport = transport
        self._wire_dtype = wire_dtype
        self._run = run
        self._load_balancing = load_balancing if path is None else None
        self._closed = False
        options = (*_OPTIONS, ("grpc.service_config", service_config(self._load_balancing)))
        self._messages = grpc.insecure_channel(target, options=options)
        # A connection of their own: what is in transit there delays no small request.
        self._streams = grpc.insecure_channel(target, options=options)
        self._retries = Retries()
        self._compute = _unary(self._messages)
        self._compute_shared = _unary(self._streams)
        self._compute_stream = self._streams.stream_stream(
            _method("ComputeStream"),
            request_serializer=framing.encode_stream_message,
            response_deserializer=framing.stream_message_decoder(pb.ComputeStreamResponse),
        )
        self._server_info = self._messages.unary_unary(
            _method("GetServerInfo"),
            request_serializer=pb.GetServerInfoRequest.SerializeToString,
            response_deserializer=pb.GetServerInfoResponse.FromString,
        )
        self._memory: MemoryPool[Memory] = MemoryPool(Memory)
        self._memory_path = None if path is None or transport == "grpc" else path + wire.MEMORY_SUFFIX
        self._shared = None if self._memory_path is None else SharedMemory(self._memory_path)

    def encode(
        self, logits: Array, labels: Array, loss: spec.WeightedSum, want_grad: bool, joint: wire.Joint | None
    ) -> Call:
        scores, targets = encode_logits(logits, self._wire_dtype), encode_labels(labels)
        request = wire.Request.checked(loss, scores.spec, targets.spec, want_grad, joint=joint, run=self._run)
        if self._is_shared(request):
            return self._in_region(request, scores, targets, logits)
        memory: list[Memory] = []

        def on_host(tensor: Outgoing) -> memoryview:
            array = tensor.in_place()
            if array is not None:
                return wire.as_bytes(array)
            memory.append(self._memory.take(tensor.spec.nbytes))
            return _written(tensor, memory[-1], 0)

        return Call(request, on_host(scores), on_host(targets), tuple(memory), logits)

    def _is_shared(self, request: wire.Request) -> bool:
        if self._memory_path is None or request.payload_bytes <= SHARED_BYTES:
            return False
        return self._transport == "shm" or os.path.exists(self._memory_path)

    def _in_region(self, request: wire.Request, logits: Outgoing, labels: Outgoing, original: Array) -> Call:
        assert self._shared is not None
        first, second, _, size = places(request)
        region = self._shared.regions.take(size)
        written = _written(logits, region, first), _written(labels, region, second)
        return Call(request, *written, (region,), original)

    def compute(self, call: Call, timeout: float) -> spec.Result[Any]:
        region = call.memory[0] if call.memory and isinstance(call.memory[0], Region) else None
        with self._own_errors():
            if region is not None:
                response, grad = self._through_region(call, region, timeout)
            else:
                try:
                    if call.request.payload_bytes <= UNARY_BYTES:
                        response, grad = self._retries.call(lambda left: self._unary(call, left), timeout)
                    else:
                        response, grad = self._retries.call(lambda left: self._stream(call, left), timeout)
                finally:
                    for memory in call.memory:
                        self._memory.give(memory)
        return spec.Result(
            loss=response.loss,
            grad=None if response.grad is None else decode_grad(grad, response, call.original, self._room),
            terms=response.terms,
            intersection=response.intersection,
            union=response.union,
            timing=response.timing,
        )

    def server_info(self, timeout: float) -> ServerInfo:
        with self._own_errors():
            info = self._server_info(pb.GetServerInfoRequest(), timeout=timeout)
        return ServerInfo(
            version=info.version,
            devices=tuple(Device(device.name, device.hardware, device.healthy) for device in info.devices),
            losses=tuple(info.losses),
            memory_budget_bytes=info.memory_budget_bytes,
            max_requests=info.max_requests,
        )

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """Turns what gRPC raises into the client's errors."""
        try:
            yield
        except grpc.RpcError as error:
            if self._closed:
                raise CallCancelledError(f"{self._name}: the client was closed") from None
            hashing = self._load_balancing == "ring_hash" and error.code() is grpc.StatusCode.INTERNAL
            if hashing and _NO_HASH in (error.details() or ""):
                raise InvalidInputError("load_balancing", _HASH_PROBLEM) from None
            raise from_rpc_error(error, self._name) from None
        except ValueError:
            if self._closed:  # What gRPC raises for a channel that was closed in the meantime.
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
        if self._shared is not None:
            self._shared.close()

    def _unary(self, call: Call, timeout: float) -> Received:
        request = framing.UnaryRequest(call.request.to_proto(), call.logits, call.labels)
        answer = self._compute(request, timeout=timeout, metadata=call.metadata)
        return self._received(answer.header, iter([answer.grad]), call)

    def _stream(self, call: Call, timeout: float) -> Received:
        answers = self._compute_stream(_messages(call), timeout=timeout, metadata=call.metadata)
        try:
            first = next(answers, None)
            if not isinstance(first, pb.ComputeStreamResponse) or not first.HasField("header"):
                raise _WrongAnswer("it does not begin with a header")
            return self._received(first.header, _chunks(answers), call)
        finally:
            answers.cancel()  # Without effect on a call that ended.

    def _received(self, header: pb.ResponseHeader, chunks: Iterable[framing.Bytes], call: Call) -> Received:
        with _fitting():
            response = wire.Response.from_proto(header, call.request)
            grad = np.empty(0, np.float32)
            if response.grad is not None:
                grad = self._memory.new(response.grad.shape, response.grad.dtype.numpy)
            wire.Assembly([wire.as_bytes(grad)]).add_all(chunks)
        return response, grad

    def _through_region(self, call: Call, region: Region, timeout: float) -> Received:
        """The region is used again once the call has ended well; after a failure the server may still be at it."""
        assert self._shared is not None
        try:
            try:
                response = self._retries.call(lambda left: self._in_shared_memory(call, region, left), timeout)
            except LossError:  # The server takes no shared memory.
                if self._transport == "shm":
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
        _, _, place, _ = places(call.request)
        return response, self._shared.regions.lend(region, place, response.grad.shape, response.grad.dtype.numpy)

    def _in_shared_memory(self, call: Call, region: Region, timeout: float) -> wire.Response:
        assert self._shared is not None
        first, second, third, _ = places(call.request)
        try:
            session = self._shared.share(region, timeout)
        except ServerUnavailableError:
            self._server_info(pb.GetServerInfoRequest(), timeout=timeout)  # If there is no server, this says so.
            raise
        shared = wire.SharedTensors(session, region.number, first, second, third)
        header = replace(call.request, shared=shared).to_proto()
        try:
            message = framing.UnaryRequest(header, b"", b"")
            answer = self._compute_shared(message, timeout=timeout, metadata=call.metadata)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:  # Perhaps it was started anew, and knows no session.
                self._shared.forget()
            raise
        with _fitting():
            return wire.Response.from_proto(answer.header, call.request)

    def _room(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        return self._memory.new(shape, np.dtype(np.float32))


class _WrongAnswer(Exception):
    pass


@contextmanager
def _fitting() -> Iterator[None]:
    """While an answer is read that may not fit the request."""
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
    array = memory.array(offset, tensor.spec.shape, tensor.spec.dtype.numpy)
    tensor.write(array)
    return wire.as_bytes(array)


def _messages(call: Call) -> Iterator[pb.ComputeStreamRequest | memoryview]:
    yield pb.ComputeStreamRequest(header=call.request.to_proto())
    yield from wire.chunks([call.logits, call.labels])


def _chunks(answers: Iterable[pb.ComputeStreamResponse | memoryview]) -> Iterator[memoryview]:
    for message in answers:
        if not isinstance(message, memoryview):
            raise _WrongAnswer("a message without a chunk came after the header")
        yield message
