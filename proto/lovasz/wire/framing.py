"""Messages that carry tensors, as protobuf encodes them, without protobuf's copies of their bytes.

Protobuf copies a bytes field when it is set, when it is serialized, when it is parsed and when it is read; here it is
copied once on the way out and not at all on the way in. What this module does not expect (another order is fine; a
field given twice is not), protobuf parses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from lovasz.v1 import loss_pb2 as pb

Bytes: TypeAlias = bytes | memoryview

_LENGTH_DELIMITED = 2
_MORE = 0x80
_LOW_BITS = 0x7F
_LONGEST_SHIFT = 28
"""Keys and lengths have five bytes at most."""
_NUMBERS = 1 << 29
_CHUNK_FIELD = 2
"""The number of ``chunk`` in both streams' messages."""


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= _MORE:
        encoded.append(number & _LOW_BITS | _MORE)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _joined(*fields: tuple[int, Bytes]) -> bytes:
    """A message of length-delimited fields, (number, value) each."""
    parts: list[Bytes] = []
    for number, value in fields:
        parts += (_varint(number << 3 | _LENGTH_DELIMITED), _varint(len(value)), value)
    return b"".join(parts)


def _fields(data: bytes) -> dict[int, memoryview] | None:
    """The length-delimited fields of a message, by number; None if it is of any other form."""
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
            known = 0 < number < _NUMBERS and number not in fields
            if key & 7 != _LENGTH_DELIMITED or not known or size > len(view) - place:
                return None
            fields[number] = view[place : place + size]
            place += size
    except IndexError:
        return None
    return fields


StreamMessageT = TypeVar("StreamMessageT", pb.ComputeStreamRequest, pb.ComputeStreamResponse)


def encode_stream_message(message: pb.ComputeStreamRequest | pb.ComputeStreamResponse | memoryview) -> bytes:
    """A message with its header, or the bytes of a chunk, as one message of a stream."""
    if isinstance(message, memoryview):
        return _joined((_CHUNK_FIELD, message))
    return message.SerializeToString()


def stream_message_decoder(kind: type[StreamMessageT]) -> Callable[[bytes], StreamMessageT | memoryview]:
    """The opposite, for one direction: gives the bytes of a chunk, or any other message as it is."""

    def decode(data: bytes) -> StreamMessageT | memoryview:
        fields = _fields(data)
        if fields is not None and fields.keys() == {_CHUNK_FIELD}:
            return fields[_CHUNK_FIELD]
        message = kind.FromString(data)
        return memoryview(message.chunk) if message.WhichOneof("message") == "chunk" else message

    return decode


@dataclass(frozen=True)
class UnaryRequest:
    """``ComputeRequest``: a header, and the bytes of logits and labels where they are."""

    header: pb.RequestHeader
    logits: Bytes
    labels: Bytes

    def encode(self) -> bytes:
        return _joined((1, self.header.SerializeToString()), (2, self.logits), (3, self.labels))

    @classmethod
    def decode(cls, data: bytes) -> UnaryRequest:
        """Raises:
        DecodeError: it is no such message.
        """
        fields = _fields(data)
        if fields is None:
            message = pb.ComputeRequest.FromString(data)
            return cls(message.header, message.logits, message.labels)
        return cls(pb.RequestHeader.FromString(bytes(fields.get(1, b""))), fields.get(2, b""), fields.get(3, b""))


@dataclass(frozen=True)
class UnaryResponse:
    """``ComputeResponse``: a header, and the bytes of the gradient where they are."""

    header: pb.ResponseHeader
    grad: Bytes

    def encode(self) -> bytes:
        return _joined((1, self.header.SerializeToString()), (2, self.grad))

    @classmethod
    def decode(cls, data: bytes) -> UnaryResponse:
        """Raises:
        DecodeError: it is no such message.
        """
        fields = _fields(data)
        if fields is None:
            message = pb.ComputeResponse.FromString(data)
            return cls(message.header, message.grad)
        return cls(pb.ResponseHeader.FromString(bytes(fields.get(1, b""))), fields.get(2, b""))
