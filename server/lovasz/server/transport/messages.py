"""Messages of the loss service as gRPC hands them over, among them bytes that cannot be decoded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import grpc

from lovasz.server.errors import AbandonedError
from lovasz.spec import InvalidInput

Message = TypeVar("Message")

_NEWS_SECONDS = 0.2
"""If a caller went away, gRPC says so within this time after the end of its messages."""


@dataclass(frozen=True)
class Undecodable:
    """Bytes that are no message. If the decoder raised instead, gRPC would end the call with INTERNAL, unseen here."""

    nbytes: int

    def error(self, expected: str) -> InvalidInput:
        return InvalidInput("message", f"got {self.nbytes} bytes that are not a valid {expected} of lovasz.v1")


def or_undecodable(decode: Callable[[bytes], Message]) -> Callable[[bytes], Message | Undecodable]:
    """A decoder that raises nothing."""

    def decoded(data: bytes) -> Message | Undecodable:
        try:
            return decode(data)
        except Exception:
            return Undecodable(len(data))

    return decoded


def decoded_stream(messages: Iterator[Message | Undecodable]) -> Iterator[Message]:
    """The messages of a stream, with errors of this server.

    gRPC's own error is not passed on, as gRPC keeps it with the call: a reference cycle would keep alive whatever its
    trace leads to.

    Raises:
        AbandonedError: the caller went away.
        InvalidInput: bytes that are no message.
    """
    try:
        for message in messages:
            if isinstance(message, Undecodable):
                raise message.error("ComputeStreamRequest")
            yield message
    except grpc.RpcError as error:
        error.__traceback__ = None
        raise AbandonedError from None


def has_left(context: grpc.ServicerContext) -> bool:
    """Whether the caller of a call whose messages ended too early went away. It waits for a moment.

    gRPC ends the messages first, and says afterwards that the call was cancelled. Until then the caller looks like one
    that is still there and has sent too little.
    """
    left = threading.Event()
    return not context.add_callback(left.set) or left.wait(_NEWS_SECONDS)
