"""Messages with tensors in them are what protobuf makes of them, byte for byte and error for error, uncopied."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import TypeAlias

import numpy as np
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lovasz import wire
from lovasz.spec import CrossEntropy, InvalidInput, LovaszSoftmax, weighted_sum
from lovasz.v1 import loss_pb2 as pb
from lovasz.wire.framing import UnaryRequest, UnaryResponse, encode_stream_message, stream_message_decoder

untimed = settings(deadline=None)

StreamMessage: TypeAlias = type[pb.ComputeStreamRequest] | type[pb.ComputeStreamResponse]

EDGES = (0, 1, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152)
"""Where the length of a length changes."""
sizes = st.sampled_from(EDGES[:6]) | st.integers(0, 40_000)
STREAM_MESSAGES = (pb.ComputeStreamRequest, pb.ComputeStreamResponse)
each_direction = pytest.mark.parametrize("kind", STREAM_MESSAGES, ids=["request", "response"])

REQUEST_HEADER = wire.Request.checked(
    weighted_sum([(0.5, LovaszSoftmax(classes=[1, 2])), (1.0, CrossEntropy(class_weights=[1, 2, 3]))]),
    wire.TensorSpec(wire.dtype_named("float16"), (2, 3, 4)),
    wire.TensorSpec(wire.dtype_named("uint8"), (2, 4)),
    want_grad=True,
).to_proto()
RESPONSE_HEADER = pb.ResponseHeader(loss=0.5, intersection=[1, 0, 2**40], union=[2, 0, 2**41], grad_scale=1024.0)


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def field(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


# --- Messages of a stream -----------------------------------------------------------------------------------------


@each_direction
@pytest.mark.parametrize("size", EDGES)
def test_a_chunk_is_encoded_as_protobuf_does(kind: StreamMessage, size: int) -> None:
    chunk = noise(size)
    encoded = encode_stream_message(memoryview(chunk))
    assert type(encoded) is bytes
    assert encoded == kind(chunk=chunk).SerializeToString()
    decoded = stream_message_decoder(kind)(encoded)
    assert isinstance(decoded, memoryview)
    assert decoded == chunk


@untimed
@given(sizes)
def test_a_chunk_of_any_size_is_encoded_as_protobuf_does(size: int) -> None:
    chunk = noise(size)
    encoded = encode_stream_message(memoryview(chunk))
    assert encoded == pb.ComputeStreamRequest(chunk=chunk).SerializeToString()
    assert stream_message_decoder(pb.ComputeStreamRequest)(encoded) == chunk


@pytest.mark.parametrize(
    "message",
    [pb.ComputeStreamRequest(header=REQUEST_HEADER), pb.ComputeStreamResponse(header=RESPONSE_HEADER)],
    ids=["request", "response"],
)
def test_a_header_travels_as_a_message(message: pb.ComputeStreamRequest | pb.ComputeStreamResponse) -> None:
    encoded = encode_stream_message(message)
    assert encoded == message.SerializeToString()
    assert stream_message_decoder(type(message))(encoded) == message


@each_direction
def test_a_message_with_nothing_in_it_is_no_chunk(kind: StreamMessage) -> None:
    assert stream_message_decoder(kind)(b"") == kind()
    assert stream_message_decoder(kind)(kind(chunk=b"").SerializeToString()) == b""


def test_a_chunk_is_not_copied() -> None:
    encoded = pb.ComputeStreamRequest(chunk=noise(50_000)).SerializeToString()
    chunk = stream_message_decoder(pb.ComputeStreamRequest)(encoded)
    assert isinstance(chunk, memoryview)
    assert np.shares_memory(np.frombuffer(chunk, np.uint8), np.frombuffer(encoded, np.uint8))


@each_direction
def test_of_header_and_chunk_the_last_holds(kind: StreamMessage) -> None:
    header, chunk = field(1, b""), field(2, b"abc")
    assert stream_message_decoder(kind)(header + chunk) == b"abc"
    message = stream_message_decoder(kind)(chunk + header)
    assert isinstance(message, kind)
    assert message.WhichOneof("message") == "header"


@each_direction
def test_of_two_chunks_the_last_holds(kind: StreamMessage) -> None:
    assert stream_message_decoder(kind)(field(2, b"first") + field(2, b"second")) == b"second"


# --- Whole requests and answers -----------------------------------------------------------------------------------


@untimed
@given(sizes, sizes)
@example(2_097_152, 2_097_151)
def test_a_request_is_encoded_as_protobuf_does(logits_size: int, labels_size: int) -> None:
    logits, labels = noise(logits_size, 1), noise(labels_size, 2)
    encoded = UnaryRequest(REQUEST_HEADER, memoryview(logits), labels).encode()
    assert pb.ComputeRequest.FromString(encoded) == pb.ComputeRequest(
        header=REQUEST_HEADER, logits=logits, labels=labels
    )
    if logits and labels:  # Of an empty field, protobuf writes nothing.
        assert encoded == pb.ComputeRequest(header=REQUEST_HEADER, logits=logits, labels=labels).SerializeToString()
    assert UnaryRequest.decode(encoded) == UnaryRequest(REQUEST_HEADER, logits, labels)


@untimed
@given(sizes)
@example(2_097_152)
def test_an_answer_is_encoded_as_protobuf_does(size: int) -> None:
    grad = noise(size)
    encoded = UnaryResponse(RESPONSE_HEADER, memoryview(grad)).encode()
    assert pb.ComputeResponse.FromString(encoded) == pb.ComputeResponse(header=RESPONSE_HEADER, grad=grad)
    if grad:
        assert encoded == pb.ComputeResponse(header=RESPONSE_HEADER, grad=grad).SerializeToString()
    assert UnaryResponse.decode(encoded) == UnaryResponse(RESPONSE_HEADER, grad)


@untimed
@given(sizes, sizes)
def test_what_protobuf_encodes_is_read(logits_size: int, labels_size: int) -> None:
    logits, labels = noise(logits_size, 1), noise(labels_size, 2)
    sent = pb.ComputeRequest(header=REQUEST_HEADER, logits=logits, labels=labels).SerializeToString()
    assert UnaryRequest.decode(sent) == UnaryRequest(REQUEST_HEADER, logits, labels)
    answer = pb.ComputeResponse(header=RESPONSE_HEADER, grad=logits).SerializeToString()
    assert UnaryResponse.decode(answer) == UnaryResponse(RESPONSE_HEADER, logits)


def test_tensors_are_not_copied() -> None:
    sent = pb.ComputeRequest(header=REQUEST_HEADER, logits=noise(50_000), labels=noise(10_000)).SerializeToString()
    request = UnaryRequest.decode(sent)
    answer_bytes = pb.ComputeResponse(header=RESPONSE_HEADER, grad=noise(50_000)).SerializeToString()
    answer = UnaryResponse.decode(answer_bytes)
    for data, message in ((request.logits, sent), (request.labels, sent), (answer.grad, answer_bytes)):
        assert np.shares_memory(np.frombuffer(data, np.uint8), np.frombuffer(message, np.uint8))


def test_a_message_with_nothing_in_it_has_empty_fields() -> None:
    assert UnaryRequest.decode(b"") == UnaryRequest(pb.RequestHeader(), b"", b"")
    assert UnaryResponse.decode(b"") == UnaryResponse(pb.ResponseHeader(), b"")


FIELDS = (field(1, REQUEST_HEADER.SerializeToString()), field(2, b"logits"), field(3, b"labels"))


@pytest.mark.parametrize(
    "fields", list(permutations(FIELDS)), ids=lambda fields: "".join(str(f[0] >> 3) for f in fields)
)
def test_fields_may_come_in_any_order(fields: Sequence[bytes]) -> None:
    assert UnaryRequest.decode(b"".join(fields)) == UnaryRequest(REQUEST_HEADER, b"logits", b"labels")


def test_a_field_given_twice_is_protobufs_to_judge() -> None:
    """The last of two byte strings holds; two messages are merged."""
    first, second = pb.RequestHeader(want_grad=True), pb.RequestHeader(logits=pb.TensorInfo(shape=[1, 2]))
    twice = field(1, first.SerializeToString()) + FIELDS[1] + field(2, b"again") + field(1, second.SerializeToString())
    merged = pb.RequestHeader(want_grad=True, logits=pb.TensorInfo(shape=[1, 2]))
    assert UnaryRequest.decode(twice) == UnaryRequest(merged, b"again", b"")


UNKNOWN = {
    "bytes": field(99, b"from the future"),
    "varint": varint(99 << 3) + varint(300),
    "64 bits": varint(99 << 3 | 1) + bytes(8),
    "32 bits": varint(99 << 3 | 5) + bytes(4),
    "group": varint(99 << 3 | 3) + field(2, b"inner") + varint(99 << 3 | 4),
}


@pytest.mark.parametrize("unknown", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_unknown_fields_are_passed_over(unknown: bytes) -> None:
    assert UnaryRequest.decode(FIELDS[0] + unknown + FIELDS[1] + FIELDS[2]) == UnaryRequest(
        REQUEST_HEADER, b"logits", b"labels"
    )
    grad = field(2, b"grad")
    assert UnaryResponse.decode(grad + unknown) == UnaryResponse(pb.ResponseHeader(), b"grad")
    assert stream_message_decoder(pb.ComputeStreamRequest)(unknown + grad) == b"grad"


# --- Bytes that are no message ------------------------------------------------------------------------------------


def verdict(kind: type[Message], data: bytes) -> Message | None:
    """The message as protobuf reads it; None if it is none."""
    try:
        return kind.FromString(data)
    except DecodeError:
        return None


def check_unary(data: bytes) -> None:
    request, answer = verdict(pb.ComputeRequest, data), verdict(pb.ComputeResponse, data)
    if isinstance(request, pb.ComputeRequest):
        assert UnaryRequest.decode(data) == UnaryRequest(request.header, request.logits, request.labels)
    else:
        with pytest.raises(DecodeError):
            UnaryRequest.decode(data)
    if isinstance(answer, pb.ComputeResponse):
        assert UnaryResponse.decode(data) == UnaryResponse(answer.header, answer.grad)
    else:
        with pytest.raises(DecodeError):
            UnaryResponse.decode(data)


def check_stream(data: bytes) -> None:
    for kind in STREAM_MESSAGES:
        message = verdict(kind, data)
        decode = stream_message_decoder(kind)
        if message is None:
            with pytest.raises(DecodeError):
                decode(data)
        elif message.WhichOneof("message") == "chunk":
            assert decode(data) == message.chunk
        else:
            assert decode(data) == message


small_fields = st.lists(st.tuples(st.integers(1, 5), st.binary(max_size=6)).map(lambda pair: field(*pair)), max_size=4)
garbage = st.binary(max_size=20) | st.builds(lambda fields, end: b"".join(fields) + end, small_fields, st.binary())


@untimed
@given(garbage)
@example(b"\x92\x00\x01a")  # a key in more bytes than it needs
@example(b"\x12\x81\x00a")  # a length in more bytes than it needs
@example(b"\x02\x01a")  # field 0
@example(b"\xfa\xff\xff\xff\xff\x01\x00")  # a field number of 33 bits
@example(b"\x12" + b"\x80" * 10 + b"\x00")  # a length of 11 bytes
@example(b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")  # a length of 64 bits
def test_any_bytes_are_judged_as_protobuf_judges_them(data: bytes) -> None:
    check_unary(data)
    check_stream(data)


@pytest.mark.parametrize("length", range(len(b"".join(FIELDS))))
def test_a_message_cut_short_is_judged_as_protobuf_judges_it(length: int) -> None:
    data = b"".join(FIELDS)[:length]
    check_unary(data)
    check_stream(data)


def test_a_header_that_is_none_is_refused() -> None:
    with pytest.raises(DecodeError):
        UnaryRequest.decode(field(1, b"\xff") + FIELDS[1])
    with pytest.raises(DecodeError):
        UnaryResponse.decode(field(1, b"\xff"))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("lead", [b"", b"\x12"], ids=["key", "length"])
def test_a_number_without_end_is_refused_before_it_has_grown(lead: bytes) -> None:
    data = lead + b"\xff" * wire.MAX_MESSAGE_BYTES
    with pytest.raises(DecodeError):
        UnaryRequest.decode(data)
    with pytest.raises(DecodeError):
        stream_message_decoder(pb.ComputeStreamRequest)(data)


# --- Shared memory ------------------------------------------------------------------------------------------------

int64 = st.integers(-(2**63), 2**63 - 1)


@untimed
@given(st.binary(max_size=20), int64, int64, int64, int64)
def test_a_header_tells_where_shared_tensors_lie(
    session: bytes, region: int, logits_offset: int, labels_offset: int, grad_offset: int
) -> None:
    shared = wire.SharedTensors(session, region, logits_offset, labels_offset, grad_offset)
    plain = wire.Request.from_proto(REQUEST_HEADER)
    request = wire.Request.checked(plain.loss, plain.logits, plain.labels, plain.want_grad, shared)
    sent = UnaryRequest(request.to_proto(), b"", b"").encode()
    received = wire.Request.from_proto(UnaryRequest.decode(sent).header)
    assert received == request
    assert received.shared == shared


def test_tensors_that_travel_are_nowhere_in_shared_memory() -> None:
    assert wire.Request.from_proto(REQUEST_HEADER).shared is None
    assert not REQUEST_HEADER.HasField("shared_tensors")
    with pytest.raises(InvalidInput):  # Shared or not, the header is checked.
        wire.Request.from_proto(pb.RequestHeader(shared_tensors=pb.SharedTensors(region=1)))
