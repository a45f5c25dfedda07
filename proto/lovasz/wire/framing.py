"""Framing: encodes and decodes messages with tensors exactly as protobuf does, without its copies.

Protobuf copies a bytes field when it is set, serialized, parsed and read. This module copies it once when it encodes,
and never when it decodes. It decodes length-delimited fields in any order, each at most once; protobuf parses every
other message.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias, TypeVar

from lovasz.v1 import loss_pb2 as pb

Bytes: TypeAlias = bytes | memoryview

_LENGTH_DELIMITED = 2
_MORE = 0x80
_LOW_BITS = 0x7F
_LONGEST_SHIFT = 28
"""Keys and lengths have at most five bytes."""
_MAX_FIELD_NUMBERS = 1 << 29
_CHUNK_FIELD = 2
"""The field number of ``chunk`` in the messages of both directions."""


@lru_cache(maxsize=256)
def _varint(number: int) -> bytes:
    """A key or a length. Few differ, as trainers send the same shapes again and again."""
    encoded = bytearray()
    while number >= _MORE:
        encoded.append(number & _LOW_BITS | _MORE)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _joined(*fields: tuple[int, Bytes]) -> bytes:
    """A message of length-delimited fields, each a pair (number, value)."""
    parts: list[Bytes] = []
    for number, value in fields:
        parts += (_varint(number << 3 | _LENGTH_DELIMITED), _varint(len(value)), value)
    return b"".join(parts)


def _fields(data: bytes) -> dict[int, memoryview] | None:
    """The length-delimited fields of a message, by number; None if it has other fields or is malformed."""
    view, place, fields = memoryview(data), 0, dict[int, memoryview]()

    def varint() -> int:
        nonlocal place
        number = shift = 0
        while True:
            byte = view[place]
            place += 1
            number |= (byte & _LOW_BITS) << shift
            if byte < _MORE:
                return number
            shift += 7
            if shift > _LONGEST_SHIFT:
                raise IndexError

    try:
        while place < len(view):
            key, size = varint(), varint()
            number = key >> 3
            known = 0 < number < _MAX_FIELD_NUMBERS and number not in fields
            if key & 7 != _LENGTH_DELIMITED or not known or size > len(view) - place:
                return None
            fields[number] = view[place : place + size]
            place += size
    except IndexError:
        return None
    return fields


StreamMessageT = TypeVar("StreamMessageT", pb.ComputeStreamRequest, pb.ComputeStreamResponse)


def encode_stream_message(message: pb.ComputeStreamRequest | pb.ComputeStreamResponse | memoryview) -> bytes:
    """Encodes a stream message: one with a header, or the bytes of a chunk."""
    if isinstance(message, memoryview):
        return _joined((_CHUNK_FIELD, message))
    return message.SerializeToString()


def stream_message_decoder(kind: type[StreamMessageT]) -> Callable[[bytes], StreamMessageT | memoryview]:
    """A decoder for one direction of a stream: it returns the bytes of a chunk, or any other message itself."""

    def decode(data: bytes) -> StreamMessageT | memoryview:
        fields = _fields(data)
        if fields is not None and fields.keys() == {_CHUNK_FIELD}:
            return fields[_CHUNK_FIELD]
        message = kind.FromString(data)
        return memoryview(message.chunk) if message.WhichOneof("message") == "chunk" else message

    return decode


@dataclass(frozen=True)
class UnaryRequest:
    """``ComputeRequest``: a header, and references to the bytes of logits and labels."""

    header: pb.RequestHeader
    logits: Bytes
    labels: Bytes

    def encode(self) -> bytes:
        return _joined((1, self.header.SerializeToString()), (2, self.logits), (3, self.labels))

    @classmethod
    def decode(cls, data: bytes) -> UnaryRequest:
        """Decodes a message without copying its tensors.

        Raises:
            DecodeError: the message is malformed.
        """
        fields = _fields(data)
        if fields is None:
            message = pb.ComputeRequest.FromString(data)
            return cls(message.header, message.logits, message.labels)
        return cls(pb.RequestHeader.FromString(bytes(fields.get(1, b""))), fields.get(2, b""), fields.get(3, b""))


@dataclass(frozen=True)
class UnaryResponse:
    """``ComputeResponse``: a header, and a reference to the bytes of the gradient."""

    header: pb.ResponseHeader
    grad: Bytes

    def encode(self) -> bytes:
        return _joined((1, self.header.SerializeToString()), (2, self.grad))

    @classmethod
    def decode(cls, data: bytes) -> UnaryResponse:
        """Decodes a message without copying its tensor.

        Raises:
            DecodeError: the message is malformed.
        """
        fields = _fields(data)
        if fields is None:
            message = pb.ComputeResponse.FromString(data)
            return cls(message.header, message.grad)
        return cls(pb.ResponseHeader.FromString(bytes(fields.get(1, b""))), fields.get(2, b""))
