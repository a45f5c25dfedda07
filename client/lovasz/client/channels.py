"""The methods of a server, on the gRPC channels of a client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from lovasz.v1 import loss_pb2 as pb
from lovasz.wire import framing


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

    def __init__(self, messages: grpc.Channel, streams: grpc.Channel) -> None:
        """Takes the channels over.

        Args:
            messages: for requests of one message.
            streams: for large transfers: a connection of their own, so that they delay no small request.
        """
        self._messages, self._streams = messages, streams
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
