"""Request and answer headers: every header survives protobuf, and an invalid one is refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lovasz import spec, wire
from lovasz.spec import CrossEntropy, InvalidInput, LovaszHinge, LovaszSoftmax, weighted_sum
from lovasz.v1 import loss_pb2 as pb

untimed = settings(deadline=None)

# --- Headers of requests ------------------------------------------------------------------------------------------


def tensor(dtype: str, *shape: int) -> wire.TensorSpec:
    return wire.TensorSpec(wire.dtype_named(dtype), shape)


def received(request: wire.Request) -> wire.Request:
    return wire.Request.from_proto(pb.RequestHeader.FromString(request.to_proto().SerializeToString()))


@untimed
@given(
    st.sampled_from(wire.FLOATS),
    st.sampled_from(wire.INTEGERS),
    st.lists(st.integers(1, 2**20), min_size=1, max_size=6),
    st.integers(2, spec.MAX_CLASSES),
    st.booleans(),
)
def test_every_header_survives_protobuf(
    float_type: str, integer_type: str, sizes: list[int], classes: int, want_grad: bool
) -> None:
    logits, labels = tensor(float_type, sizes[0], classes, *sizes[1:]), tensor(integer_type, *sizes)
    request = wire.Request.checked(weighted_sum(CrossEntropy()), logits, labels, want_grad)
    assert received(request) == request


def test_headers_of_one_loss_do_not_share_it() -> None:
    request = wire.Request.checked(weighted_sum(LovaszHinge()), tensor("float32", 2, 4), tensor("uint8", 2, 4), True)
    first, second = request.to_proto(), request.to_proto()
    first.loss.terms[0].weight = 7.0
    assert second.loss.terms[0].weight == 1.0
    assert received(request) == request


def test_kept_headers_take_few_bytes_whatever_callers_send() -> None:
    loss = weighted_sum(LovaszSoftmax(classes=range(2050)))  # A header of 4 KB, near the longest that is kept.
    headers = [
        wire.Request.checked(loss, tensor("float32", 1, 2300, 4 + n), tensor("uint8", 1, 4 + n), True).to_proto()
        for n in range(300)
    ]
    tracemalloc.start()
    try:
        for sent in headers:
            assert wire.Request.from_proto(sent).loss == loss
        nbytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert wire.Request.from_proto(headers[-1]).loss is wire.Request.from_proto(headers[-1]).loss
    assert nbytes < 8 << 20


FLOATS = "DATA_TYPE_FLOAT32, DATA_TYPE_FLOAT16, DATA_TYPE_BFLOAT16"
INTEGERS = "DATA_TYPE_UINT8, DATA_TYPE_INT16, DATA_TYPE_INT32, DATA_TYPE_INT64"


def header(loss: spec.LossLike | None = None, **changes: Any) -> pb.RequestHeader:
    """A good header for logits (2, 3, 4), with other fields in it."""
    fields = {"logits": tensor("float32", 2, 3, 4).to_proto(), "labels": tensor("uint8", 2, 4).to_proto(), **changes}
    return pb.RequestHeader(loss=wire.loss_to_proto(weighted_sum(loss or LovaszSoftmax())), **fields)


def test_the_header_that_the_refusals_start_from_is_good() -> None:
    assert wire.Request.from_proto(header()).layout == spec.Layout(2, 3, 4, label_values=3)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (pb.RequestHeader(), "loss.terms: got 0 terms"),
        (header(logits=pb.TensorInfo()), f"logits.data_type: got DATA_TYPE_UNSPECIFIED; expected one of {FLOATS}"),
        (
            header(labels=pb.TensorInfo()),
            f"labels.data_type: got DATA_TYPE_UNSPECIFIED; expected one of {INTEGERS}",
        ),
        (header(logits=pb.TensorInfo(data_type=99)), f"logits.data_type: got 99; expected one of {FLOATS}"),
        (header(logits=tensor("int32", 2, 3, 4).to_proto()), "logits: got element type int32; expected one of float32"),
        (header(labels=tensor("float16", 2, 4).to_proto()), "labels: got element type float16; expected one of uint8"),
        (header(labels=tensor("uint8", 2, 5).to_proto()), "labels: got shape (2, 5) for logits (2, 3, 4); expected"),
        (header(logits=tensor("float32", 2, -3, 4).to_proto()), "logits: got shape (2, -3, 4); expected sizes >= 1"),
        (header(logits=tensor("float32").to_proto()), "logits: got shape (); expected (N, C, *spatial)"),
        (
            header(logits=tensor("float32", 0, 3, 4).to_proto(), labels=tensor("uint8", 0, 4).to_proto()),
            "logits: got shape (0, 3, 4), which holds no element",
        ),
        (
            header(logits=tensor("float32", *[1] * 17).to_proto(), labels=tensor("uint8", *[1] * 16).to_proto()),
            "logits: got 17 axes; expected at most 16",
        ),
        (
            header(logits=tensor("float32", 1, 65_537).to_proto(), labels=tensor("uint8", 1).to_proto()),
            "logits: got 65537 channels; expected at most 65536",
        ),
        (header(LovaszSoftmax(classes=[3])), "classes: got class 3; expected class numbers in [0, 3)"),
        (header(CrossEntropy(class_weights=[1.0])), "class_weights: got 1 numbers; expected 3, one per class"),
        (
            header(
                logits=tensor("float32", 0, 3, 2**48 // 3 + 1).to_proto(),
                labels=tensor("uint8", 0, 2**48 // 3 + 1).to_proto(),
                joint=pb.Joint(run="r", world_size=2, call=b"1", process=b"1"),
            ),
            "logits: got shape (0, 3, 93824992236886); expected at most 281474976710656 as the product of",
        ),
        (header(LovaszHinge()), "labels: got shape (2, 4) for binary logits (2, 3, 4); expected (2, 3, 4)"),
    ],
)
def test_a_header_that_cannot_be_is_refused(message: pb.RequestHeader, text: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        wire.Request.from_proto(pb.RequestHeader.FromString(message.SerializeToString()))
    assert text in str(refused.value)


FIELD_OF_LATER = b"\xf8\x07\x01"
"""The field 127, with the value 1."""


@pytest.mark.parametrize(
    "path",
    ["", "loss", "loss.terms", "loss.terms.lovasz_softmax", "loss.terms.cross_entropy", "logits", "labels", "joint"],
)
def test_what_a_newer_version_asks_for_is_refused(path: str) -> None:
    """Left out, it would be a loss that nobody asked for."""
    message = header(
        [(1.0, LovaszSoftmax()), (1.0, CrossEntropy())], joint=pb.Joint(run="r", world_size=2, call=b"1", process=b"1")
    )
    assert wire.Request.from_proto(pb.RequestHeader.FromString(message.SerializeToString())).joint is not None
    part: Any = message
    for name in path.split(".") if path else ():
        part = part.terms[-1 if "cross_entropy" in path else 0] if name == "terms" else getattr(part, name)
    part.MergeFromString(FIELD_OF_LATER)
    with pytest.raises(InvalidInput, match=r": got field number 127, which this version does not know; expected"):
        wire.Request.from_proto(pb.RequestHeader.FromString(message.SerializeToString()))


@pytest.mark.parametrize(
    ("size", "elements"), [(2**29, 2**60), (2**62, 2**126)], ids=["2^60 elements", "2^126 elements"]
)
def test_absurd_sizes_are_counted_exactly_and_allocate_nothing(size: int, elements: int) -> None:
    shape = (size, 4, size)
    message = header(logits=tensor("float32", *shape).to_proto(), labels=tensor("int64", size, size).to_proto())
    tracemalloc.start()
    try:
        request = wire.Request.from_proto(message)
        assert request.layout.elements == elements
        assert request.payload_bytes == 4 * elements + 8 * elements // 4
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


# --- Places in a joint step -----------------------------------------------------------------------------------------


def a_request(**options: Any) -> wire.Request:
    specs = wire.TensorSpec(wire.dtype_named("float32"), (1, 3, 2)), wire.TensorSpec(wire.dtype_named("uint8"), (1, 2))
    return wire.Request.checked(spec.weighted_sum(spec.LovaszSoftmax()), *specs, want_grad=True, **options)


@pytest.mark.parametrize(
    "joint",
    [
        wire.Joint("a run", 0, 0, 1),
        wire.Joint("ü" * 200, (1 << 63) - 1, 65_535, 65_536, bytes(64), (1 << 31) - 1, True, bytes(64)),
    ],
    ids=["shortest", "longest"],
)
def test_a_joint_request_comes_out_as_it_went_in(joint: wire.Joint) -> None:
    request = a_request(joint=joint, run="its name")
    assert wire.Request.from_proto(pb.RequestHeader.FromString(request.to_proto().SerializeToString())) == request
    assert wire.Request.from_proto(a_request().to_proto()).joint is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"run": ""}, "joint.run: got ''; expected 1 to 200 characters"),
        ({"run": "x" * 201}, "expected 1 to 200 characters"),
        ({"world_size": 0}, r"joint.world_size: got 0; expected 1 to 65536"),
        ({"world_size": 65_537}, r"joint.world_size: got 65537; expected 1 to 65536"),
        ({"rank": 4}, r"joint.rank: got 4; expected a rank in \[0, 4\)"),
        ({"rank": -1}, r"joint.rank: got -1; expected a rank in \[0, 4\)"),
        ({"step": -1}, "joint.step: got -1; expected a 64-bit number >= 0"),
        ({"step": True}, "joint.step: got True; expected an integer"),
        ({"call": bytes(65)}, "joint.call: got 65 bytes; expected at most 64"),
        ({"process": bytes(65)}, "joint.process: got 65 bytes; expected at most 64"),
        ({"secret": b"short"}, "joint.secret: got 5 bytes; expected none, or 8 to 64"),
        ({"secret": bytes(65)}, "joint.secret: got 65 bytes; expected none, or 8 to 64"),
        ({"round": -1}, "joint.round: got -1; expected a 32-bit number >= 0"),
        ({"round": 1 << 31}, "joint.round: got 2147483648; expected a 32-bit number >= 0"),
    ],
    ids=str,
)
def test_a_place_that_cannot_be_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(spec.InvalidInput, match=said):
        wire.Joint(**{"run": "r", "step": 0, "rank": 0, "world_size": 4, **values})


PLACE = wire.Joint("a run", 7, 2, 4, b"call", 3, process=b"process")


def test_what_a_rank_says_that_does_not_come_arrives() -> None:
    abort = wire.Abort(PLACE, want_grad=True, reason="labels: got text")
    assert wire.Abort.from_proto(pb.AbortStepRequest.FromString(abort.to_proto().SerializeToString())) == abort
    leave = wire.Leave(PLACE, evaluation_step=5)
    assert wire.Leave.from_proto(pb.LeaveRunRequest.FromString(leave.to_proto().SerializeToString())) == leave


def test_a_long_reason_is_cut() -> None:
    message = wire.Abort(PLACE, want_grad=False, reason="x" * 100_000).to_proto()
    assert wire.Abort.from_proto(message).reason == "x" * 1000


def test_what_a_rank_cannot_say_is_refused() -> None:
    with pytest.raises(spec.InvalidInput, match="evaluation_step: got -1; expected a 64-bit number >= 0"):
        wire.Leave(PLACE, -1)
    with pytest.raises(spec.InvalidInput, match=r"joint.run: got ''"):
        wire.Abort.from_proto(pb.AbortStepRequest())
    with pytest.raises(spec.InvalidInput, match=r"joint.run: got ''"):
        wire.Leave.from_proto(pb.LeaveRunRequest())


def test_only_a_rank_of_a_joint_step_may_have_no_images() -> None:
    nothing = tensor("float32", 0, 3, 2), tensor("uint8", 0, 2)
    loss = spec.weighted_sum(spec.LovaszSoftmax())
    request = wire.Request.checked(loss, *nothing, want_grad=True, joint=PLACE)
    assert received(request) == request
    assert (request.layout.images, request.tensor_bytes) == (0, 0)
    with pytest.raises(InvalidInput, match="which holds no element"):
        wire.Request.checked(loss, *nothing, want_grad=True)


def test_the_name_of_a_run_is_bounded() -> None:
    with pytest.raises(spec.InvalidInput, match="run: got 201 characters; expected at most 200"):
        a_request(run="x" * 201)


# --- Headers of answers -------------------------------------------------------------------------------------------

REQUEST = wire.Request.checked(
    weighted_sum([(1.0, CrossEntropy()), (1.0, LovaszSoftmax())]),
    tensor("float16", 2, 3, 4),
    tensor("uint8", 2, 4),
    want_grad=True,
)


def answer(request: wire.Request = REQUEST) -> wire.Response:
    terms = (
        spec.TermResult("cross_entropy", 0.5, np.empty(0)),
        spec.TermResult("lovasz_softmax", 0.25, np.array([0.125, np.nan, 0.375])),
    )
    grad = request.logits if request.want_grad else None
    timing = spec.Timing(0.5, 0.25, 0.125, 3, 2.0, 0.0625)
    return wire.Response(0.75, terms, np.array([1, 0, 2**40]), np.array([2, 0, 2**41]), grad, 2.0**20, timing)


@pytest.mark.parametrize("want_grad", [True, False])
def test_an_answer_survives_protobuf(want_grad: bool) -> None:
    request = replace(REQUEST, want_grad=want_grad)
    sent = answer(request)
    message = pb.ResponseHeader.FromString(sent.to_proto().SerializeToString())
    got = wire.Response.from_proto(message, request)
    assert (got.loss, got.grad, got.grad_scale, got.timing) == (sent.loss, sent.grad, sent.grad_scale, sent.timing)
    for mine, theirs in zip(got.terms, sent.terms, strict=True):
        assert (mine.kind, mine.loss) == (theirs.kind, theirs.loss)
        np.testing.assert_array_equal(mine.per_class_loss, theirs.per_class_loss, strict=True)
    np.testing.assert_array_equal(got.intersection, sent.intersection, strict=True)
    np.testing.assert_array_equal(got.union, sent.union, strict=True)


def without_terms(message: pb.ResponseHeader) -> None:
    del message.terms[:]


def with_a_class_less(message: pb.ResponseHeader) -> None:
    message.terms[1].per_class_loss.pop()


def with_classes_of_cross_entropy(message: pb.ResponseHeader) -> None:
    message.terms[0].per_class_loss.extend([1.0, 1.0, 1.0])


def without_grad(message: pb.ResponseHeader) -> None:
    message.ClearField("grad")


def with_another_shape(message: pb.ResponseHeader) -> None:
    message.grad.shape[:] = [2, 4, 3]


def with_another_type(message: pb.ResponseHeader) -> None:
    message.grad.data_type = pb.DATA_TYPE_FLOAT32


def with_no_type(message: pb.ResponseHeader) -> None:
    message.grad.data_type = pb.DATA_TYPE_UNSPECIFIED


def with_scale(scale: float) -> Callable[[pb.ResponseHeader], None]:
    def change(message: pb.ResponseHeader) -> None:
        message.grad_scale = scale

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (without_terms, "response.terms: got 0; expected 2"),
        (with_a_class_less, "response.per_class_loss: got 2 for lovasz_softmax; expected 3"),
        (with_classes_of_cross_entropy, "response.per_class_loss: got 3 for cross_entropy; expected 0"),
        (lambda message: message.intersection.pop(), "response.intersection: got 2 counts; expected 3"),
        (lambda message: message.union.append(1), "response.union: got 4 counts; expected 3"),
        (without_grad, "response.grad: got None; expected type and shape of the logits"),
        (with_another_shape, "response.grad: got "),
        (with_another_type, "response.grad: got "),
        (with_no_type, "response.grad.data_type: got DATA_TYPE_UNSPECIFIED"),
        *((with_scale(scale), f"response.grad_scale: got {scale}; expected a power of two")
          for scale in (0.0, -2.0, 3.0, float("inf"), float("nan"))),
    ],
)  # fmt: skip
def test_an_answer_that_does_not_fit_is_refused(change: Callable[[pb.ResponseHeader], None], text: str) -> None:
    message = answer().to_proto()
    change(message)
    with pytest.raises(InvalidInput) as refused:
        wire.Response.from_proto(message, REQUEST)
    assert text in str(refused.value)


def test_a_gradient_that_was_not_wanted_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"response\.grad: got "):
        wire.Response.from_proto(answer().to_proto(), replace(REQUEST, want_grad=False))


def test_the_longest_header_that_a_loss_needs_is_read() -> None:
    weights, classes = [1.5] * spec.MAX_CLASSES, range(spec.MAX_CLASSES)
    loss = weighted_sum([(1.0, LovaszSoftmax(classes, weights, per_image=True))] * 4)
    tensors = [wire.TensorSpec(wire.dtype_named(name), shape) for name, shape in LONGEST]
    request = wire.Request.checked(loss, *tensors, True, offsets=range(1, 1001))
    assert wire.Request.from_proto(request.to_proto()) == request


LONGEST = (("float32", (1000, spec.MAX_CLASSES, 1)), ("int32", (1000, 1)))


def test_the_reason_of_an_abort_has_no_control_characters() -> None:
    message = wire.Abort(wire.Joint("run", 0, 0, 2), True, "out of\x1b[31m memory\n\x9b").to_proto()
    assert wire.Abort.from_proto(message).reason == "out of [31m memory  "
