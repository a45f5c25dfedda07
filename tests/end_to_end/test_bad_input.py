"""Whatever comes over the wire: the right code, a text that helps, nothing left behind, and a server that goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import numpy as np
import pytest
from support.scrape import metric

from lovasz import wire
from lovasz.client import LossClient, LovaszSoftmax
from lovasz.server.launch import ServerProcess
from lovasz.spec import weighted_sum
from lovasz.v1 import loss_pb2 as pb
from lovasz.v1 import loss_pb2_grpc

LOGITS = np.random.RandomState(0).randn(2, 3, 4, 4).astype(np.float32)
LABELS = np.random.RandomState(1).randint(0, 3, (2, 4, 4)).astype(np.uint8)


def good() -> pb.ComputeRequest:
    header = pb.RequestHeader(
        loss=wire.loss_to_proto(weighted_sum(LovaszSoftmax())),
        logits=pb.TensorInfo(data_type=pb.DATA_TYPE_FLOAT32, shape=LOGITS.shape),
        labels=pb.TensorInfo(data_type=pb.DATA_TYPE_UINT8, shape=LABELS.shape),
        want_grad=True,
    )
    return pb.ComputeRequest(header=header, logits=LOGITS.tobytes(), labels=LABELS.tobytes())


@pytest.fixture(scope="module")
def stub(server: ServerProcess) -> Iterator[loss_pb2_grpc.LossServiceStub]:
    with grpc.insecure_channel(server.target) as channel:
        yield loss_pb2_grpc.LossServiceStub(channel)


@pytest.fixture(autouse=True)
def _the_server_goes_on(server: ServerProcess, stub: loss_pb2_grpc.LossServiceStub) -> Iterator[None]:
    yield
    assert stub.Compute(good()).header.loss == pytest.approx(0.76, abs=0.2)
    assert metric(server, "lovasz_in_flight_bytes") == 0
    assert metric(server, "lovasz_in_flight_requests") == 0
    assert metric(server, "lovasz_requests_total", code="INTERNAL") == 0


def stream_of(request: pb.ComputeRequest) -> Iterator[pb.ComputeStreamRequest]:
    yield pb.ComputeStreamRequest(header=request.header)
    for chunk in wire.chunks([memoryview(request.logits), memoryview(request.labels)], 100):
        yield pb.ComputeStreamRequest(chunk=bytes(chunk))


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as refused:
        call()
    error = refused.value
    return error.code(), error.details()


@dataclass(frozen=True)
class Bad:
    name: str
    spoil: Callable[[pb.ComputeRequest], object]
    said: str
    code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT


def _label(value: int, place: int) -> Callable[[pb.ComputeRequest], None]:
    def spoil(request: pb.ComputeRequest) -> None:
        labels = bytearray(request.labels)
        labels[place] = value
        request.labels = bytes(labels)

    return spoil


def _shapes(logits: list[int], labels: list[int]) -> Callable[[pb.ComputeRequest], None]:
    def spoil(request: pb.ComputeRequest) -> None:
        request.header.logits.shape[:] = logits
        request.header.labels.shape[:] = labels

    return spoil


def _softmax(**options: object) -> Callable[[pb.ComputeRequest], None]:
    def spoil(request: pb.ComputeRequest) -> None:
        loss = request.header.loss.terms[0].lovasz_softmax
        loss.MergeFrom(pb.LovaszSoftmax(**options))

    return spoil


def _enum(name: str, value: int) -> Callable[[pb.ComputeRequest], None]:
    return lambda request: setattr(request.header.loss.terms[0].lovasz_softmax, name, value)


BAD = [
    Bad("empty request", lambda r: r.Clear(), "loss.terms: got 0 terms; expected 1 to 16"),
    Bad("no term", lambda r: r.header.loss.ClearField("terms"), "loss.terms: got 0 terms; expected 1 to 16"),
    Bad("too many terms", lambda r: r.header.loss.terms.extend([r.header.loss.terms[0]] * 16), "got 17 terms"),
    Bad("no kind", lambda r: r.header.loss.terms.add(weight=1), "loss.terms[1].loss: is not set"),
    Bad(
        "no weight",
        lambda r: r.header.loss.terms[0].ClearField("weight"),
        "loss.terms[0].weight: is not set; expected a finite number, such as 1",
    ),
    Bad("weight", lambda r: setattr(r.header.loss.terms[0], "weight", float("nan")), "got nan; expected a finite"),
    Bad(
        "classes unspecified",
        _enum("class_selection", 0),
        "lovasz_softmax.class_selection: got CLASS_SELECTION_UNSPECIFIED; expected",
    ),
    Bad("classes unknown", _enum("class_selection", 99), "lovasz_softmax.class_selection: got 99; expected"),
    Bad("input unspecified", _enum("input", 0), "lovasz_softmax.input: got INPUT_KIND_UNSPECIFIED; expected"),
    Bad("input unknown", _enum("input", 77), "lovasz_softmax.input: got 77; expected"),
    Bad("listed without selection", _softmax(listed_classes=[1]), "lovasz_softmax.listed_classes: got [1] beside"),
    Bad(
        "listed beyond C",
        _softmax(class_selection=pb.CLASS_SELECTION_LISTED, listed_classes=[1, 3]),
        "classes: got class 3; expected class numbers in [0, 3)",
    ),
    Bad("class weights", _softmax(class_weights=[1, 2]), "class_weights: got 2 numbers; expected 3, one per class"),
    Bad("negative weight", _softmax(class_weights=[1, -2, 1]), "class_weights[1]: got -2.0; expected a number >= 0"),
    Bad("element type unset", lambda r: r.header.logits.ClearField("data_type"), "logits.data_type: got DATA_TYPE_UNS"),
    Bad("element type unknown", lambda r: setattr(r.header.labels, "data_type", 55), "labels.data_type: got 55"),
    Bad("float labels", lambda r: setattr(r.header.labels, "data_type", 1), "labels: got element type float32"),
    Bad("integer logits", lambda r: setattr(r.header.logits, "data_type", 4), "logits: got element type uint8"),
    Bad("one axis", _shapes([96], [96]), "logits: got shape (96,); expected (N, C, *spatial)"),
    Bad("labels' shape", _shapes([2, 3, 4, 4], [2, 4, 5]), "labels: got shape (2, 4, 5) for logits (2, 3, 4, 4)"),
    Bad("empty", _shapes([0, 3, 4, 4], [0, 4, 4]), "logits: got shape (0, 3, 4, 4), which holds no element"),
    Bad("zero classes", _shapes([2, 0, 4, 4], [2, 4, 4]), "logits: got shape (2, 0, 4, 4) with no class"),
    Bad("one class", _shapes([2, 1, 4, 4], [2, 4, 4]), "single class, whose softmax is 1 everywhere"),
    Bad("negative size", _shapes([2, -3, 4, 4], [2, 4, 4]), "logits: got shape (2, -3, 4, 4); expected sizes >= 1"),
    Bad("many axes", _shapes([1] * 40, [1] * 39), "logits: got 40 axes; expected at most 16"),
    Bad("many classes", _shapes([1, 1 << 20, 1], [1, 1]), "logits: got 1048576 channels; expected at most 65536"),
    Bad(
        "2^60 elements",
        _shapes([1 << 30, 4, 1 << 28], [1 << 30, 1 << 28]),
        "whole budget is 4 GiB (--memory-budget)",
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    ),
    Bad(
        "sizes whose product is beyond 64 bits",
        _shapes([1 << 62, 4, 1 << 62], [1 << 62, 1 << 62]),
        "whole budget is 4 GiB (--memory-budget)",
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    ),
    Bad("label out of range", _label(3, 17), "labels: got 3 at index [1, 0, 1]; expected a value in [0, 3) (1 such"),
    Bad(
        "hinge beside softmax",
        lambda r: r.header.loss.terms.add(weight=1).lovasz_hinge.SetInParent(),
        "loss: LovaszHinge is combined with a softmax loss",
    ),
    Bad(
        "label smoothing",
        lambda r: setattr(r.header.loss.terms.add(weight=1).cross_entropy, "label_smoothing", 1.5),
        "label_smoothing: got 1.5; expected a number in [0, 1]",
    ),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_bad_requests_are_refused_alike_by_both_methods(stub: loss_pb2_grpc.LossServiceStub, bad: Bad) -> None:
    request = good()
    bad.spoil(request)
    for call in (lambda: stub.Compute(request), lambda: list(stub.ComputeStream(stream_of(request)))):
        code, text = refusal(call)
        assert bad.said in text
        assert code is bad.code


@pytest.mark.parametrize("off", [-1, 1])
def test_unary_byte_counts_that_differ_from_the_header(stub: loss_pb2_grpc.LossServiceStub, off: int) -> None:
    for name, expected in (("logits", LOGITS.nbytes), ("labels", LABELS.nbytes)):
        request = good()
        setattr(request, name, bytes(expected + off))
        code, text = refusal(lambda request=request: stub.Compute(request))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert f"{name}: got {expected + off} bytes; expected {expected}" in text


def test_a_stream_that_is_too_short_or_too_long(stub: loss_pb2_grpc.LossServiceStub) -> None:
    total = LOGITS.nbytes + LABELS.nbytes
    code, text = refusal(lambda: list(stub.ComputeStream(iter(list(stream_of(good()))[:-1]))))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert f"bytes; expected {total} as declared" in text
    extra = [*stream_of(good()), pb.ComputeStreamRequest(chunk=b"x")]
    code, text = refusal(lambda: list(stub.ComputeStream(iter(extra))))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert f"payload: got at least {total + 1} bytes; expected {total} as declared" in text


def test_a_stream_in_the_wrong_order(stub: loss_pb2_grpc.LossServiceStub) -> None:
    messages = list(stream_of(good()))
    for wrong, said in (
        ([], "header: the stream does not begin with one"),
        (messages[1:], "header: the stream does not begin with one"),
        ([pb.ComputeStreamRequest()], "header: the stream does not begin with one"),
        ([messages[0], *messages], "message: got a message without a chunk"),
    ):
        code, text = refusal(lambda wrong=wrong: list(stub.ComputeStream(iter(wrong))))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert said in text


def test_a_message_over_the_limit(stub: loss_pb2_grpc.LossServiceStub) -> None:
    request = good()
    request.logits = bytes(5 << 20)
    code, text = refusal(lambda: stub.Compute(request))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in text


NO_UTF8 = pb.RequestHeader(run="????").SerializeToString().replace(b"????", b"\xff\xfe\xfd\xfc")


@pytest.mark.parametrize("header", [b"\xff\xff\xff\xff", NO_UTF8], ids=["no protobuf", "a run that is not UTF-8"])
def test_bytes_that_are_no_message(server: ServerProcess, header: bytes) -> None:
    unary, stream = b"\x0a" + bytes([len(header)]) + header, [b"\x0a" + bytes([len(header)]) + header]
    with grpc.insecure_channel(server.target) as channel:
        for method, call in (
            ("Compute", lambda: channel.unary_unary("/lovasz.v1.LossService/Compute")(unary)),
            (
                "ComputeStream",
                lambda: list(channel.stream_stream("/lovasz.v1.LossService/ComputeStream")(iter(stream))),
            ),
        ):
            before = metric(server, "lovasz_requests_total", method=method, code="INVALID_ARGUMENT")
            code, text = refusal(call)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert text == f"message: got {len(unary)} bytes that are not a valid {method}Request of lovasz.v1"
            assert metric(server, "lovasz_requests_total", method=method, code="INVALID_ARGUMENT") == before + 1


def test_a_long_name_that_is_wrong_is_told_as_far_as_it_fits(stub: loss_pb2_grpc.LossServiceStub) -> None:
    request = good()
    request.header.run = "\N{GRINNING FACE}" * 4000
    code, text = refusal(lambda: stub.Compute(request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text.startswith("run: got ")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_give_nan_to_their_own_request(server: ServerProcess, value: float) -> None:
    logits = LOGITS.copy()
    logits[1, LABELS[1, 3, 3], 3, 3] = value  # At the label: elsewhere minus infinity masks a class.
    before = metric(server, "lovasz_nonfinite_results_total")
    with LossClient(server.target) as client:
        spoilt = client.submit(logits, LABELS, LovaszSoftmax())
        whole = client.submit(LOGITS, LABELS, LovaszSoftmax())
        assert np.isnan(spoilt.result().loss)
        assert np.isnan(spoilt.result().grad).all()
        assert np.isfinite(whole.result().loss)
        assert np.isfinite(whole.result().grad).all()
    assert metric(server, "lovasz_nonfinite_results_total") == before + 1


def test_all_void_gives_zero_and_no_error(server: ServerProcess) -> None:
    with LossClient(server.target) as client:
        result = client.compute(LOGITS, np.full_like(LABELS, 255), LovaszSoftmax(ignore_index=255))
    assert result.loss == 0
    assert not result.grad.any()


def test_refusals_are_counted(server: ServerProcess, stub: loss_pb2_grpc.LossServiceStub) -> None:
    request = good()
    request.header.labels.shape[:] = [1]
    for reason, code in (("invalid", "INVALID_ARGUMENT"),):
        before = metric(server, "lovasz_rejections_total", reason=reason)
        answered = metric(server, "lovasz_requests_total", method="Compute", code=code)
        refusal(lambda: stub.Compute(request))
        assert metric(server, "lovasz_rejections_total", reason=reason) == before + 1
        assert metric(server, "lovasz_requests_total", method="Compute", code=code) == answered + 1
