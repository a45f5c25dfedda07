"""The client against a real server, and against small servers that fail in every way that a server can."""

from __future__ import annotations

import copy
import math
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from support import vector_cases
from support.comparison import bits, norm_error, normal, random_labels
from support.fork_server import ForkedServer
from support.scripted_server import (
    Answer,
    ScriptedServer,
    abort,
    always,
    good_answer,
    serving,
    serving_nothing,
    until_gone,
)
from torch import Tensor

import lovasz.client
import lovasz.core
from lovasz.client import (
    AuthenticationError,
    CallAbortedError,
    CallCancelledError,
    CrossEntropy,
    DeadlineExceededError,
    IncompatibleServerError,
    InvalidInputError,
    Joint,
    JointMismatchError,
    LossClient,
    LossError,
    LovaszHinge,
    LovaszSoftmax,
    Result,
    ServerFaultError,
    ServerOverloadedError,
    ServerUnavailableError,
    TLSError,
)
from lovasz.client.errors import from_rpc_error
from lovasz.client.remote import UNARY_BYTES
from lovasz.server.launch import ServerProcess
from lovasz.spec import LOSS_KINDS, InvalidInput, LossLike
from lovasz.v1 import loss_pb2 as pb
from lovasz.version import VERSION

CASES = vector_cases.load()
MIX: LossLike = [(0.5, CrossEntropy(label_smoothing=0.1)), (2.0, LovaszSoftmax(classes="all", per_image=True))]
LOSSES: list[LossLike] = [LovaszSoftmax(), LovaszSoftmax(classes=[2, 0], ignore_index=1), CrossEntropy(), MIX]


@dataclass(frozen=True)
class Size:
    """Logits (images, classes, side, side), and the method that they travel by."""

    name: str
    images: int
    classes: int
    side: int
    method: str

    def input(self, seed: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        logits = normal(self.images, self.classes, self.side, self.side, seed=seed, dtype=dtype)
        return logits, random_labels(self.images, self.side, self.side, values=self.classes, seed=seed + 1)


SMALL = Size("small", 2, 3, 8, "Compute")
MEDIUM = Size("medium", 2, 5, 150, "Compute")  # 0.9 MB: more than gRPC keeps for a retry unless it is told
LARGE = Size("large", 2, 5, 240, "ComputeStream")
LARGE_16_BIT = Size("large", 2, 5, 340, "ComputeStream")
each_size = pytest.mark.parametrize("size", [SMALL, MEDIUM, LARGE], ids=lambda size: size.name)


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[LossClient]:
    with LossClient(server.target) as client:
        yield client


def numpy_bits(result: Result[Any]) -> tuple[object, ...]:
    return bits(replace(result, grad=None if result.grad is None else torch.from_numpy(result.grad)))


# --- Answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "loss", "want_grad"),
    [
        *((SMALL, loss, want_grad) for loss in LOSSES for want_grad in (True, False)),
        (LARGE, LovaszSoftmax(), True),
        (LARGE, MIX, True),
        (LARGE, MIX, False),
    ],
)
def test_answers_are_those_of_the_core_bit_for_bit(
    client: LossClient, size: Size, loss: LossLike, want_grad: bool
) -> None:
    logits, labels = size.input()
    expected = lovasz.core.compute(logits, labels, loss, want_grad=want_grad)
    of_torch = client.compute(logits, labels, loss, want_grad=want_grad)
    of_numpy = client.compute(logits.numpy(), labels.numpy(), loss, want_grad=want_grad)
    assert bits(of_torch) == numpy_bits(of_numpy) == bits(expected)
    if want_grad:
        assert (type(of_torch.grad), of_torch.grad.dtype) == (Tensor, torch.float32)
        assert (type(of_numpy.grad), of_numpy.grad.dtype) == (np.ndarray, np.float32)
    else:
        assert of_torch.grad is None
        assert of_numpy.grad is None


@each_size
def test_small_requests_go_in_one_message_and_large_ones_in_a_stream(size: Size) -> None:
    logits, labels = size.input()
    with serving() as server, LossClient(server.target) as client:
        assert client.compute(logits, labels, [(3.0, LovaszSoftmax())]).loss == 3.0
        assert server.methods == [size.method]


@pytest.mark.parametrize(("excess", "method"), [(0, "Compute"), (1, "ComputeStream")])
def test_the_limit_of_one_message(excess: int, method: str) -> None:
    pixels = UNARY_BYTES // (2 * 4 + 1) + excess  # two float32 logits and a label each
    with serving() as server, LossClient(server.target) as client:
        client.compute(np.zeros((pixels, 2), np.float32), np.zeros(pixels, np.uint8), LovaszSoftmax())
        assert server.methods == [method]


@pytest.mark.parametrize("multilabel", [False, True])
def test_hinge(client: LossClient, multilabel: bool) -> None:
    logits, labels = normal(2, 3, 7, seed=3, dtype=torch.float32), random_labels(2, 3, 7, values=2, seed=4, void=9)
    loss = LovaszHinge(multilabel=multilabel, ignore_index=9, per_image=True)
    assert bits(client.compute(logits, labels, loss)) == bits(lovasz.core.compute(logits, labels, loss))


def test_per_class_losses_iou_and_timing(client: LossClient) -> None:
    logits, labels = SMALL.input()
    result = client.compute(logits, labels, MIX)
    hits = [int(((logits.argmax(1) == c) & (labels == c)).sum()) for c in range(3)]
    either = [int(((logits.argmax(1) == c) | (labels == c)).sum()) for c in range(3)]
    assert result.intersection.tolist() == hits
    assert result.union.tolist() == either
    np.testing.assert_array_equal(result.class_iou, np.divide(hits, either))
    assert [term.kind for term in result.terms] == ["cross_entropy", "lovasz_softmax"]
    assert result.loss == pytest.approx(0.5 * result.terms[0].loss + 2 * result.terms[1].loss, rel=1e-12)
    assert result.per_class_loss.mean() == pytest.approx(result.terms[1].loss, rel=1e-6)
    assert result.timing is not None
    assert result.timing.batch_requests >= 1
    assert min(result.timing.receive_seconds, result.timing.queue_seconds, result.timing.compute_seconds) >= 0
    assert result.timing.compute_seconds > 0


def test_a_class_that_is_not_scored_has_no_loss(client: LossClient) -> None:
    logits, labels = SMALL.input()
    result = client.compute(logits, labels.clamp(max=1), LovaszSoftmax())
    assert np.isnan(result.per_class_loss).tolist() == [False, False, True]


each_16_bit_request = pytest.mark.parametrize(
    ("size", "loss"), [(SMALL, LovaszSoftmax()), (LARGE_16_BIT, CrossEntropy())], ids=["small", "large"]
)


@each_16_bit_request
def test_float16_gradients_do_not_underflow(client: LossClient, size: Size, loss: LossLike) -> None:
    logits, labels = size.input(dtype=torch.float16)
    expected = lovasz.core.compute(logits, labels, loss)
    result = client.compute(logits, labels, loss)
    assert expected.grad is not None
    true = expected.grad
    bound = true.abs() * 2.0**-11  # half a step of float16
    if size is LARGE_16_BIT:
        assert ((true.half().float() - true).abs() > bound).sum() > 0.5 * true.numel()
    counted = true.abs() > true.abs().max() * 2.0**-28  # below, float16 has no full mantissa beside the largest
    assert counted.sum() > 0.9 * (true != 0).sum()
    assert result.grad.dtype == torch.float32
    assert ((result.grad - true).abs() <= bound)[counted].all()
    assert result.loss == expected.loss


@each_16_bit_request
def test_bfloat16_gradients_are_rounded_once(client: LossClient, size: Size, loss: LossLike) -> None:
    logits, labels = size.input(dtype=torch.bfloat16)
    expected = lovasz.core.compute(logits, labels, loss).grad
    result = client.compute(logits, labels, loss)
    assert expected is not None
    assert torch.equal(result.grad, expected.bfloat16().float())


def test_16_bit_requests_are_streamed_too() -> None:
    with serving() as server, LossClient(server.target) as client:
        client.compute(*LARGE_16_BIT.input(dtype=torch.float16), LovaszSoftmax())
        assert server.methods == [LARGE_16_BIT.method]


def test_float64_logits_travel_as_float32(client: LossClient) -> None:
    logits, labels = SMALL.input(dtype=torch.float64)
    expected = lovasz.core.compute(logits.float(), labels, LovaszSoftmax())
    assert expected.grad is not None
    assert bits(client.compute(logits, labels, LovaszSoftmax())) == bits(replace(expected, grad=expected.grad.double()))


def test_odd_arrays_give_the_same_answer(client: LossClient) -> None:
    logits, labels = (tensor.numpy() for tensor in SMALL.input())
    expected = numpy_bits(client.compute(logits, labels, LovaszSoftmax()))
    flipped = np.ascontiguousarray(logits[:, :, ::-1])[:, :, ::-1], np.ascontiguousarray(labels[:, ::-1])[:, ::-1]
    foreign = logits.astype(">f4"), labels.astype(">i2")
    assert flipped[0].strides != logits.strides
    with LossClient("inprocess") as here:
        for target in (client, here):
            for same in (flipped, foreign):
                assert numpy_bits(target.compute(*same, LovaszSoftmax())) == expected


def test_logits_that_are_not_finite_make_nan(client: LossClient) -> None:
    logits, labels = SMALL.input()
    logits[0, 0, 0, 0] = math.inf
    result = client.compute(logits, labels, LovaszSoftmax())
    assert math.isnan(result.loss)
    assert result.grad.isnan().all()


def test_server_info(client: LossClient) -> None:
    info = client.server_info()
    assert info.version == VERSION
    assert info.losses == LOSS_KINDS
    assert [(device.name, device.healthy) for device in info.devices] == [("cpu", True)]
    assert info.memory_budget_bytes > 0
    assert info.max_requests > 0


# --- In this process ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_inprocess_gives_what_a_server_gives(client: LossClient, case: vector_cases.Case) -> None:
    with LossClient("inprocess") as here:
        local, remote = (c.compute(case.logits, case.labels, case.loss_spec) for c in (here, client))
    assert numpy_bits(local) == numpy_bits(remote)
    assert remote.loss == pytest.approx(case.loss, rel=1e-5, abs=1e-6)
    assert norm_error(torch.from_numpy(remote.grad), torch.from_numpy(case.grad)) < 1e-4


def test_inprocess_is_a_target_like_another() -> None:
    logits, labels = SMALL.input()
    with LossClient("inprocess") as here:
        info = here.server_info()
        assert (info.version, info.losses) == (VERSION, LOSS_KINDS)
        expected = lovasz.core.compute(logits, labels, MIX, want_grad=False)
        assert bits(here.submit(logits, labels, MIX, want_grad=False).result()) == bits(expected)
        with pytest.raises(InvalidInputError, match="labels: got shape"):
            here.compute(logits, labels[:1], MIX)
        with pytest.raises(InvalidInputError, match="labels: got 7"):
            here.compute(logits, torch.full_like(labels, 7), MIX)
        with pytest.raises(InvalidInputError, match="logits: got list; expected a numpy array, a torch tensor"):
            here.compute([[1.0, 2.0]], labels, MIX)
    with pytest.raises(CallCancelledError, match="inprocess: the client was closed"):
        here.compute(logits, labels, MIX)


# --- Many calls at a time -----------------------------------------------------------------------------------------


def test_futures_hold_each_its_own_answer(client: LossClient) -> None:
    inputs = [size.input(seed) for seed in range(4) for size in (SMALL, LARGE, SMALL)]
    futures = [client.submit(logits, labels, CrossEntropy()) for logits, labels in inputs]
    for (logits, labels), future in zip(inputs, futures, strict=True):
        assert bits(future.result()) == bits(lovasz.core.compute(logits, labels, CrossEntropy()))


def test_a_later_call_may_be_answered_first() -> None:
    second_done = threading.Event()

    def first_waits(call: int, header: pb.RequestHeader, context: grpc.ServicerContext) -> Answer:
        if header.loss.terms[0].weight == 1.0:
            second_done.wait(30)
        return good_answer(header)

    logits, labels = SMALL.input()
    with serving(first_waits) as server, LossClient(server.target) as client:
        first, second = (client.submit(logits, labels, [(weight, LovaszSoftmax())]) for weight in (1.0, 2.0))
        assert second.result().loss == 2.0
        assert not first.done()
        second_done.set()
        assert first.result().loss == 1.0


def test_threads_share_a_client(client: LossClient) -> None:
    start = threading.Barrier(8)

    def run(thread: int) -> bool:
        inputs = [size.input(100 * thread + i) for i, size in enumerate((SMALL, LARGE, SMALL))]
        expected = [bits(lovasz.core.compute(*one, CrossEntropy())) for one in inputs]
        start.wait()
        return [bits(client.compute(*one, CrossEntropy())) for one in inputs] == expected

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(run, range(8))) == [True] * 8


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, lambda client: pickle.loads(pickle.dumps(client))])
def test_a_copy_opens_its_own_connection(server: ServerProcess, copying: Callable[[LossClient], LossClient]) -> None:
    with LossClient(server.target, timeout=30, run="copied") as first:
        expected = bits(first.compute(*SMALL.input(), LovaszSoftmax()))
        again = copying(first)
    with again:
        assert (again.target, again.options) == (first.target, first.options)
        assert bits(again.compute(*SMALL.input(), LovaszSoftmax())) == expected


# --- What is refused here, without a server -----------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [0, -1.0, math.nan])
def test_timeouts_that_cannot_be(timeout: float) -> None:
    text = f"timeout: got {timeout}; expected seconds > 0"
    with pytest.raises(ValueError, match=text):
        LossClient("localhost:1", timeout=timeout)
    with LossClient("localhost:1") as client:
        for call in (client.compute, client.submit):
            with pytest.raises(ValueError, match=text):
                call(*SMALL.input(), LovaszSoftmax(), timeout=timeout)
        with pytest.raises(ValueError, match=text):
            client.server_info(timeout=timeout)


@pytest.mark.parametrize("load_balancing", ["pick_first", "", True])
def test_load_balancing_that_cannot_be(load_balancing: Any) -> None:
    text = f"load_balancing: got {load_balancing!r}; expected None or one of round_robin, ring_hash"
    for target in ("localhost:1", "inprocess"):
        with pytest.raises(ValueError, match=text):
            LossClient(target, load_balancing=load_balancing)


@pytest.mark.parametrize("target", ["", None, 50051])
def test_targets_that_cannot_be(target: Any) -> None:
    with pytest.raises(ValueError, match=f"target: got {target!r}; expected HOST:PORT"):
        LossClient(target)


@pytest.mark.parametrize(
    ("logits", "labels", "loss", "field", "text"),
    [
        (np.zeros((1, 2, 3), int), np.zeros((1, 3), int), LovaszSoftmax(), "logits", "logits: got dtype int64"),
        (np.zeros((1, 2, 3)), np.full((1, 3), 0.5), LovaszSoftmax(), "labels", "labels: got 0.5 at index"),
        (np.zeros((1, 2, 3)), np.zeros((1, 4), int), LovaszSoftmax(), "labels", "labels: got shape (1, 4)"),
        (np.zeros((1, 2, 3)), np.zeros((1, 3), int), "lovasz", "loss", "loss: got 'lovasz'; expected LovaszSoftmax"),
        (np.zeros((1, 2, 3)), np.zeros((1, 3), int), [], "loss", "loss: got 0 terms; expected 1 to 16"),
    ],
)
def test_bad_requests_are_refused_before_they_are_sent(
    logits: Any, labels: Any, loss: Any, field: str, text: str
) -> None:
    with LossClient("localhost:1") as client:
        for call in (client.compute, client.submit):
            with pytest.raises(InvalidInputError) as refused:
                call(logits, labels, loss)
            assert refused.value.field == field
            assert str(refused.value).startswith(text)


def test_an_argument_of_another_type_is_named() -> None:
    run: Any = "run-7"
    with LossClient("localhost:1") as client:
        for call in (client.compute, client.submit):
            with pytest.raises(InvalidInputError, match=r"^joint: got 'run-7'; expected a lovasz.client.Joint"):
                call(*SMALL.input(), LovaszSoftmax(), joint=run)
            with pytest.raises(InvalidInputError, match=r"^want_grad: got 'no'; expected True or False"):
                call(*SMALL.input(), LovaszSoftmax(), want_grad="no")
        for tell in (lambda: client.abort(run, "why"), lambda: client.leave(run, 0)):
            with pytest.raises(InvalidInputError, match=r"^joint: got 'run-7'; expected a lovasz.client.Joint"):
                tell()


def test_a_closed_client_says_so() -> None:
    with LossClient("localhost:1") as client:
        pass
    client.close()
    for call in (client.compute, client.submit):
        with pytest.raises(CallCancelledError, match="localhost:1: the client was closed"):
            call(*SMALL.input(), LovaszSoftmax())
    with pytest.raises(CallCancelledError, match="localhost:1: the client was closed"):
        client.server_info()


# --- Errors -------------------------------------------------------------------------------------------------------


@each_size
def test_a_label_that_only_the_server_sees_is_refused_by_name(client: LossClient, size: Size) -> None:
    logits, labels = size.input()
    labels[1, 2, 3] = 77
    with pytest.raises(InvalidInputError, match="77") as refused:
        client.compute(logits, labels, LovaszSoftmax())
    assert refused.value.field == "labels"
    future = client.submit(logits, labels, LovaszSoftmax())
    assert isinstance(future.exception(), InvalidInputError)
    labels[1, 2, 3] = 0
    assert client.compute(logits, labels, LovaszSoftmax()).loss > 0


ERRORS: dict[grpc.StatusCode, type[LossError]] = {
    grpc.StatusCode.CANCELLED: CallCancelledError,
    grpc.StatusCode.UNKNOWN: ServerFaultError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInputError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.NOT_FOUND: ServerFaultError,
    grpc.StatusCode.ALREADY_EXISTS: ServerFaultError,
    grpc.StatusCode.PERMISSION_DENIED: ServerFaultError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ServerOverloadedError,
    grpc.StatusCode.FAILED_PRECONDITION: JointMismatchError,
    grpc.StatusCode.ABORTED: CallAbortedError,
    grpc.StatusCode.UNIMPLEMENTED: IncompatibleServerError,
    grpc.StatusCode.OUT_OF_RANGE: ServerFaultError,
    grpc.StatusCode.INTERNAL: ServerFaultError,
    grpc.StatusCode.UNAVAILABLE: ServerUnavailableError,
    grpc.StatusCode.DATA_LOSS: ServerFaultError,
}


def test_the_table_of_errors_is_complete() -> None:
    assert set(ERRORS) == set(grpc.StatusCode) - {grpc.StatusCode.OK}
    assert {*ERRORS.values(), TLSError} == set(LossError.__subclasses__())  # TLS fails before there is a call.


def test_errors_are_also_what_python_calls_them() -> None:
    assert issubclass(InvalidInputError, ValueError)
    assert issubclass(InvalidInputError, InvalidInput)
    assert issubclass(DeadlineExceededError, TimeoutError)


@pytest.fixture(scope="module")
def aborting() -> Iterator[LossClient]:
    """A client of a server that aborts each call with the status whose number is the weight of the loss."""
    codes = {code.value[0]: code for code in grpc.StatusCode}

    def script(call: int, header: pb.RequestHeader, context: grpc.ServicerContext) -> Answer:
        abort(context, codes[int(header.loss.terms[0].weight)], "labels: got 7: bad", pushback_ms=-1)

    with serving(script) as server, LossClient(server.target) as client:
        yield client


@each_size
@pytest.mark.parametrize(("code", "kind"), ERRORS.items(), ids=lambda value: getattr(value, "name", ""))
def test_every_status_becomes_an_error_of_the_client(
    aborting: LossClient, size: Size, code: grpc.StatusCode, kind: type[LossError]
) -> None:
    with pytest.raises(LossError) as raised:
        aborting.compute(*size.input(), [(float(code.value[0]), LovaszSoftmax())])
    assert type(raised.value) is kind
    assert not isinstance(raised.value, grpc.RpcError)
    if isinstance(raised.value, InvalidInputError):
        assert (raised.value.field, raised.value.problem) == ("labels", "got 7: bad")
    else:
        late = "no answer arrived within the timeout of the call: " if kind is DeadlineExceededError else ""
        assert str(raised.value) == f"{aborting.target}: {late}labels: got 7: bad ({code.name})"


def test_errors_survive_pickling() -> None:
    class Refusal(grpc.RpcError):
        def __init__(self, code: grpc.StatusCode) -> None:
            self.code, self.details = lambda: code, lambda: "labels: got 7"

    for code in ERRORS:
        error = from_rpc_error(Refusal(code), "here:1")
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


@each_size
def test_a_server_that_does_not_answer_in_time(size: Size) -> None:
    def hang(call: int, header: pb.RequestHeader, context: grpc.ServicerContext) -> Answer:
        until_gone(context)
        return good_answer(header)

    with serving(hang) as server, LossClient(server.target) as client:
        late = rf"^{server.target}: no answer arrived within the timeout of the call: .*\(DEADLINE_EXCEEDED\)"
        with pytest.raises(DeadlineExceededError, match=late + "$"):
            client.compute(*size.input(), LovaszSoftmax(), timeout=0.3)
        assert server.methods == [size.method]
        with pytest.raises(DeadlineExceededError, match=late + "; .* it must be longer than --joint-timeout$"):
            client.compute(*size.input(), LovaszSoftmax(), timeout=0.3, joint=Joint("r", 0, 2, step=0))
        with pytest.raises(TimeoutError):
            client.submit(*size.input(), LovaszSoftmax(), timeout=0.3).result()


def test_a_submitted_call_is_made_in_the_context_of_its_caller(
    client: LossClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where tracers look for what a call belongs to."""
    span: ContextVar[str] = ContextVar("span", default="none")
    finish = client._finish
    seen: list[str] = []

    def noted(*arguments: Any) -> Any:
        seen.append(span.get())
        return finish(*arguments)

    monkeypatch.setattr(client, "_finish", noted)
    for name in ("first", "second"):
        token = span.set(name)
        future = client.submit(*SMALL.input(), LovaszSoftmax())
        span.reset(token)
        assert future.result().loss > 0
    assert seen == ["first", "second"]


def test_close_cancels_a_call_of_another_thread_and_lets_submitted_ones_finish() -> None:
    called, closing = threading.Event(), threading.Event()

    def script(call: int, header: pb.RequestHeader, context: grpc.ServicerContext) -> Answer:
        called.set()
        if header.loss.terms[0].weight == 1.0:
            until_gone(context)
        else:
            closing.wait(30)
        return good_answer(header)

    one = SMALL.input()
    with serving(script) as server, ThreadPoolExecutor(1) as thread:
        client = LossClient(server.target)
        cancelled = thread.submit(client.compute, *one, [(1.0, LovaszSoftmax())])
        called.wait(30)
        submitted = client.submit(*one, [(2.0, LovaszSoftmax())])
        closing.set()
        client.close()
        assert submitted.done()
        assert submitted.result().loss == 2.0
        assert isinstance(cancelled.exception(), CallCancelledError)


@pytest.fixture
def nobody() -> Iterator[str]:
    """A target where nobody listens: the port is taken, so that nobody else can."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_nobody_is_there(nobody: str) -> None:
    with (
        LossClient(nobody) as client,
        pytest.raises(ServerUnavailableError, match=f"^{nobody}: no server answers there; is it running"),
    ):
        client.server_info()


def test_a_host_name_that_nobody_knows() -> None:
    with (
        LossClient("nobody.invalid:50051", timeout=5.0) as client,
        pytest.raises(
            ServerUnavailableError, match=r"^nobody.invalid:50051: the host name could not be resolved \(DNS\)"
        ),
    ):
        client.server_info()


def test_a_server_without_the_loss_service() -> None:
    with serving_nothing() as target, LossClient(target) as client:
        for size in (SMALL, LARGE):
            with pytest.raises(IncompatibleServerError, match=target):
                client.compute(*size.input(), LovaszSoftmax())
        with pytest.raises(IncompatibleServerError, match=target):
            client.server_info()


def changed(change: Callable[[Answer], object]) -> Callable[[int, pb.RequestHeader, grpc.ServicerContext], Answer]:
    def script(call: int, header: pb.RequestHeader, context: grpc.ServicerContext) -> Answer:
        answer = good_answer(header)
        change(answer)
        return answer

    return script


@each_size
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda answer: setattr(answer, "header", None), r"it does not begin with a header|response\.terms: got 0"),
        (lambda answer: answer.header.ClearField("terms"), r"response\.terms: got 0; expected 1"),
        (lambda answer: answer.header.ClearField("grad"), r"response\.grad: got None; expected type and shape"),
        (lambda answer: answer.header.grad.shape.append(1), r"response\.grad: got .*; expected type and shape"),
        (lambda answer: setattr(answer.header, "grad_scale", 0.0), r"response\.grad_scale: got 0\.0; expected a power"),
        (lambda answer: answer.header.union.append(1), r"response\.union: got \d counts; expected \d"),
        (lambda answer: setattr(answer, "grad", answer.grad[:-1]), r"payload: got \d+ bytes; expected \d+ as declared"),
        (lambda answer: setattr(answer, "grad", answer.grad + b"1"), r"payload: got at least \d+ bytes; expected"),
    ],
)  # fmt: skip
def test_an_answer_that_does_not_fit(size: Size, change: Callable[[Answer], object], text: str) -> None:
    with serving(changed(change)) as server, LossClient(server.target) as client:
        with pytest.raises(IncompatibleServerError, match=text) as raised:
            client.compute(*size.input(), LovaszSoftmax())
        assert str(raised.value).startswith(f"{server.target}: the answer does not fit the request: ")


def test_a_gradient_that_nobody_asked_for() -> None:
    def script(call: int, header: pb.RequestHeader, context: grpc.ServicerContext) -> Answer:
        header.want_grad = True
        return good_answer(header)

    with (
        serving(script) as server,
        LossClient(server.target) as client,
        pytest.raises(IncompatibleServerError, match=r"response\.grad: got "),
    ):
        client.compute(*SMALL.input(), LovaszSoftmax(), want_grad=False)


# --- Several servers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "key"), [("cityscapes-7", "cityscapes-7"), ("rün 1/2\n", "r%C3%BCn%201%2F2%0A"), ("%", "%25")]
)
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=lambda size: size.name)
def test_joint_calls_say_their_run_to_proxies(size: Size, run: str, key: str) -> None:
    said: list[str | bytes | None] = []

    def script(call: int, header: pb.RequestHeader, context: grpc.ServicerContext) -> Answer:
        said.append(dict(context.invocation_metadata()).get("lovasz-run"))
        return good_answer(header)

    with serving(script) as server, LossClient(server.target) as client:
        client.compute(*size.input(), LovaszSoftmax(), joint=Joint(run, 0, 1, 0))
        client.compute(*size.input(), LovaszSoftmax())
    assert said == [key, None]


@pytest.mark.parametrize("load_balancing", [None, "round_robin"])
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=lambda size: size.name)
def test_the_servers_that_a_client_calls(size: Size, load_balancing: str | None) -> None:
    def busy_at_first(call: int, header: pb.RequestHeader, context: grpc.ServicerContext) -> Answer:
        return failing(1, grpc.StatusCode.UNAVAILABLE, pushback_ms=1)(call, header, context)

    with serving(busy_at_first) as first, serving(busy_at_first) as second:
        target = f"ipv4:{first.target},{second.target}"
        with LossClient(target, load_balancing=load_balancing) as client:
            for _ in range(20):
                assert client.compute(*size.input(), LovaszSoftmax()).loss == 1.0
        calls = sorted([len(first.methods), len(second.methods)])
    if load_balancing is None:
        assert calls == [0, 21]
    else:
        assert sum(calls) == 22, "tried again where it was busy"
        assert calls[0] >= 5


def test_ring_hash_without_grpcs_variable_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY", raising=False)
    with serving() as server, LossClient(f"ipv4:{server.target}", load_balancing="ring_hash") as client:
        joint = Joint("a run", 0, 1, 0)
        for call in (
            client.server_info,
            lambda: client.compute(*SMALL.input(), LovaszSoftmax()),
            lambda: client.compute(*SMALL.input(), LovaszSoftmax(), joint=joint),
            lambda: client.compute(*LARGE.input(), LovaszSoftmax(), joint=joint),
        ):
            with pytest.raises(
                InvalidInputError, match=r"expected .* GRPC_EXPERIMENTAL_\w+=true, set before"
            ) as raised:
                call()
            assert raised.value.field == "load_balancing"
        assert server.methods == [], "nothing is sent wherever it may end"


def test_a_unix_socket_is_one_server_whatever_balances(tmp_path: Path) -> None:
    with ForkedServer(["--device", "cpu", "--listen", f"unix:{tmp_path}/s"]) as server:
        for load_balancing in ("round_robin", "ring_hash"):
            with LossClient(server.target, load_balancing=load_balancing) as client:
                assert client.compute(*SMALL.input(), LovaszSoftmax(), joint=Joint("a run", 0, 1, 0)).loss > 0


# --- Retries ------------------------------------------------------------------------------------------------------


def failing(
    times: int, code: grpc.StatusCode, pushback_ms: int | None = None
) -> Callable[[int, pb.RequestHeader, grpc.ServicerContext], Answer]:
    """Fails the first ``times`` calls, then answers."""

    def script(call: int, header: pb.RequestHeader, context: grpc.ServicerContext) -> Answer:
        if call < times:
            abort(context, code, f"not yet, {call}", pushback_ms)
        return good_answer(header)

    return script


def call(server: ScriptedServer, size: Size, timeout: float = 30.0) -> float:
    """The loss that comes back; 3 for a good answer."""
    with LossClient(server.target, timeout=timeout) as client:
        return client.compute(*size.input(), [(3.0, LovaszSoftmax())]).loss


@each_size
def test_a_server_that_is_away_for_a_moment_is_tried_again(size: Size) -> None:
    with serving(failing(2, grpc.StatusCode.UNAVAILABLE)) as server:
        assert call(server, size) == 3.0
        assert server.methods == [size.method] * 3


@each_size
def test_what_is_sent_again_is_whole(size: Size) -> None:
    def every_third(call: int, header: pb.RequestHeader, context: grpc.ServicerContext) -> Answer:
        return failing(2, grpc.StatusCode.UNAVAILABLE, pushback_ms=1)(call % 3, header, context)

    logits, labels = size.input()
    with serving(every_third) as server, LossClient(server.target) as client:
        for _ in range(60):
            client.compute(logits, labels, LovaszSoftmax())
        assert server.received_bytes == [4 * logits.numel() + labels.numel()] * 60


@each_size
def test_a_full_server_is_tried_again_when_it_says(size: Size) -> None:
    with serving(failing(4, grpc.StatusCode.RESOURCE_EXHAUSTED, pushback_ms=1)) as server:
        assert call(server, size) == 3.0
        assert server.methods == [size.method] * 5


def test_a_full_server_is_not_tried_before_it_says() -> None:
    with serving(failing(1, grpc.StatusCode.RESOURCE_EXHAUSTED, pushback_ms=60_000)) as server:
        with pytest.raises((DeadlineExceededError, ServerOverloadedError)):
            call(server, SMALL, timeout=1.0)  # Without being told, the next try would come after 0.3 s.
        assert server.methods == ["Compute"]


@each_size
def test_a_request_that_can_never_fit_is_not_tried_again(size: Size) -> None:
    with serving(failing(1, grpc.StatusCode.RESOURCE_EXHAUSTED, pushback_ms=-1)) as server:
        with pytest.raises(ServerOverloadedError, match="not yet, 0"):
            call(server, size)
        assert server.methods == [size.method]


def test_the_fifth_failure_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the server says when to try again."""
    monkeypatch.setattr("lovasz.client.retry.INITIAL_BACKOFF_SECONDS", 0.001)
    with serving(failing(9, grpc.StatusCode.RESOURCE_EXHAUSTED)) as server:
        with pytest.raises(ServerOverloadedError, match="not yet, 4"):
            call(server, SMALL)
        assert len(server.methods) == 5


@each_size
@pytest.mark.parametrize(
    "code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED], ids=["starts", "full"]
)
def test_a_server_that_starts_or_is_full_is_waited_for(size: Size, code: grpc.StatusCode) -> None:
    """It says when to try again, so the address is right."""
    with serving(failing(9, code, pushback_ms=1)) as server:
        assert call(server, size) == 3.0
        assert server.methods == [size.method] * 10


@each_size
@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED], ids=lambda code: code.name)
def test_a_client_that_had_an_answer_is_patient(size: Size, code: grpc.StatusCode) -> None:
    def away_for_long(call: int, header: pb.RequestHeader, context: grpc.ServicerContext) -> Answer:
        if 1 <= call <= 9:
            abort(context, code, f"not yet, {call}", 1)
        return good_answer(header)

    with serving(away_for_long) as server, LossClient(server.target) as client:
        client.compute(*size.input(), LovaszSoftmax())
        client.compute(*size.input(), LovaszSoftmax())
        assert server.methods == [size.method] * 11


@each_size
def test_a_call_that_a_proxy_cut_off_is_tried_again(size: Size) -> None:
    """Envoy's answer where a server closes a connection, as a client of gRPC reports it."""
    text = "Stream removed (RST_STREAM (Received RST_STREAM with error code 2))"

    def cut_off_once(call: int, header: pb.RequestHeader, context: grpc.ServicerContext) -> Answer:
        if call == 0:
            abort(context, grpc.StatusCode.INTERNAL, text)
        return good_answer(header)

    with serving(cut_off_once) as server, LossClient(server.target) as client:
        client.compute(*size.input(), LovaszSoftmax())
        assert server.methods == [size.method] * 2
    with serving(always(grpc.StatusCode.INTERNAL, text)) as server, LossClient(server.target, timeout=0.5) as client:
        with pytest.raises(ServerUnavailableError, match="RST_STREAM"):
            client.compute(*size.input(), LovaszSoftmax())
        assert len(server.methods) >= 1


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.ABORTED])
def test_other_failures_are_not_tried_again(code: grpc.StatusCode) -> None:
    with serving(failing(1, code, pushback_ms=1)) as server:
        with pytest.raises(ERRORS[code], match="not yet, 0"):
            call(server, SMALL)
        assert server.methods == ["Compute"]


def test_closing_while_a_stream_waits_to_be_tried_again_cancels_it() -> None:
    with serving(failing(9, grpc.StatusCode.UNAVAILABLE, pushback_ms=300)) as server:
        client = LossClient(server.target)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.compute, *LARGE.input(), LovaszSoftmax())
            while not server.methods:
                threading.Event().wait(0.01)
            client.close()
            with pytest.raises(CallCancelledError):
                waiting.result(timeout=30)


def test_an_endless_timeout_is_taken() -> None:
    with serving(lambda _, header, context: good_answer(header)) as server, LossClient(server.target) as client:
        assert client.compute(*SMALL.input(), LovaszSoftmax(), timeout=math.inf).loss == 1.0
