"""Messages of the loss service as gRPC hands them over, among them bytes that cannot be decoded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import grpc

from lovasz.server.errors import AbandonedError
from lovasz.spec import InvalidInput

Message = TypeVar("Message")


@dataclass(frozen=True)
class Undecodable:
    """Bytes that are no message. If the decoder raised instead, gRPC would end the call with INTERNAL, unseen here."""

    nbytes: int

    def error(self, expected: str) -> InvalidInput:
        return InvalidInput("message", f"got {self.nbytes} bytes that are no {expected} of lovasz.v1")


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
