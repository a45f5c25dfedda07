"""The gRPC channels of a client, and the methods that are called on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from lovasz import wire
from lovasz.client.load_balancing import LoadBalancing, service_config
from lovasz.client.proxy import enabled_option
from lovasz.v1 import loss_pb2 as pb
from lovasz.wire import framing

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


class Channels:
    """Two channels to a server, which connect at the first call.

    Attributes:
        unary: Compute, for small requests.
        shared: Compute, for requests in shared memory.
        stream: ComputeStream.
        info: GetServerInfo.
        abort: AbortStep.
        leave: LeaveRun.
    """

    def __init__(self, target: str, *, http_proxy: bool, load_balancing: LoadBalancing | None) -> None:
        options = (
            *_OPTIONS,
            enabled_option(target, http_proxy),
            ("grpc.service_config", service_config(load_balancing)),
        )
        self._messages = grpc.insecure_channel(target, options=options)
        # Large transfers have their own connection, so that they delay no small request.
        self._streams = grpc.insecure_channel(target, options=options)
        self.unary = _compute(self._messages)
        self.shared = _compute(self._streams)
        self.stream = self._streams.stream_stream(
            _method("ComputeStream"),
            request_serializer=framing.encode_stream_message,
            response_deserializer=framing.stream_message_decoder(pb.ComputeStreamResponse),
        )
        self.info = _plain(self._messages, "GetServerInfo")
        self.abort = _plain(self._messages, "AbortStep")
        self.leave = _plain(self._messages, "LeaveRun")

    def close(self) -> None:
        """Ends the connections, and all calls on them."""
        self._messages.close()
        self._streams.close()


def _compute(channel: grpc.Channel) -> Callable[..., framing.UnaryResponse]:
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


def _method(name: str) -> str:
    return f"/{pb.DESCRIPTOR.services_by_name['LossService'].full_name}/{name}"
