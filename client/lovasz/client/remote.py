"""A server as the target of calls: small requests in one message, large ones in a stream, either with retries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from lovasz import spec, wire
from lovasz.client.client import Call, Device, ServerInfo, encode
from lovasz.client.errors import CallCancelledError, IncompatibleServerError, from_rpc_error
from lovasz.client.retry import service_config, with_retries
from lovasz.client.tensors import Array, decode_grad
from lovasz.spec import InvalidInput
from lovasz.v1 import loss_pb2 as pb
from lovasz.v1 import loss_pb2_grpc

UNARY_BYTES = 2 << 20
"""Requests whose payload is larger are streamed: about where that gets faster (measured on loopback, 2 cores)."""

_RETRY_BUFFER_BYTES = 2 * UNARY_BYTES
"""gRPC tries again only what fits into its buffer, which is smaller unless it is told."""

_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Reconnecting to a server that was restarted should not wait for gRPC's default of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


class RemoteTarget:
    """A server behind gRPC."""

    def __init__(self, target: str) -> None:
        self._name = target
        self._closed = False
        retrying = (
            ("grpc.service_config", service_config("Compute")),
            ("grpc.per_rpc_retry_buffer_size", _RETRY_BUFFER_BYTES),
        )
        self._messages = grpc.insecure_channel(target, options=_OPTIONS + retrying)
        # A connection of their own: what is in transit there delays no small request.
        self._streams = grpc.insecure_channel(target, options=(*_OPTIONS, ("grpc.enable_retries", 0)))
        self._stub = loss_pb2_grpc.LossServiceStub(self._messages)
        self._stream_stub = loss_pb2_grpc.LossServiceStub(self._streams)

    def encode(self, logits: Array, labels: Array, loss: spec.WeightedSum, want_grad: bool) -> Call:
        return encode(logits, labels, loss, want_grad)

    def compute(self, call: Call, timeout: float) -> spec.Result[Any]:
        with self._own_errors():
            if call.request.payload_bytes <= UNARY_BYTES:
                response, grad = self._unary(call, timeout)
            else:
                response, grad = with_retries(lambda left: self._stream(call, left), timeout)
        return spec.Result(
            loss=response.loss,
            grad=None if response.grad is None else decode_grad(grad, response, call.original),
            terms=response.terms,
            intersection=response.intersection,
            union=response.union,
            timing=response.timing,
        )

    def server_info(self, timeout: float) -> ServerInfo:
        with self._own_errors():
            info = self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=timeout)
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
            raise from_rpc_error(error, self._name) from None
        except ValueError:
            if self._closed:  # What gRPC raises for a channel that was closed in the meantime.
                raise CallCancelledError(f"{self._name}: the client was closed") from None
            raise
        except _WrongAnswer as error:
            raise IncompatibleServerError(f"{self._name}: the answer does not fit the request: {error}") from None

    def close(self) -> None:
        self._closed = True
        self._messages.close()
        self._streams.close()

    def _unary(self, call: Call, timeout: float) -> tuple[wire.Response, npt.NDArray[Any]]:
        request = pb.ComputeRequest(
            header=call.request.to_proto(), logits=bytes(call.logits.data), labels=bytes(call.labels.data)
        )
        answer = self._stub.Compute(request, timeout=timeout)
        return _received(answer.header, iter([answer.grad]), call)

    def _stream(self, call: Call, timeout: float) -> tuple[wire.Response, npt.NDArray[Any]]:
        answers = self._stream_stub.ComputeStream(_messages(call), timeout=timeout)
        try:
            first = next(answers, None)
            if first is None or first.WhichOneof("message") != "header":
                raise _WrongAnswer("it does not begin with a header")
            return _received(first.header, (message.chunk for message in answers), call)
        finally:
            answers.cancel()  # Without effect on a call that ended.


class _WrongAnswer(Exception):
    pass


def _messages(call: Call) -> Iterator[pb.ComputeStreamRequest]:
    yield pb.ComputeStreamRequest(header=call.request.to_proto())
    for chunk in wire.chunks([call.logits.data, call.labels.data]):
        yield pb.ComputeStreamRequest(chunk=chunk)


def _received(header: pb.ResponseHeader, chunks: Iterator[bytes], call: Call) -> tuple[wire.Response, npt.NDArray[Any]]:
    try:
        response = wire.Response.from_proto(header, call.request)
        grad = response.grad
        array = np.empty(0 if grad is None else grad.shape, wire.DTYPES[0].numpy if grad is None else grad.dtype.numpy)
        wire.Assembly([wire.as_bytes(array)]).add_all(chunks)
    except InvalidInput as error:
        raise _WrongAnswer(str(error)) from None
    return response, array
