"""Shared memory between a client and a real server: the same answers, and every way in which it can go wrong."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from support.footprint import Footprint
from support.scrape import metric
from support.vector_cases import Case, load
from support.waiting import eventually

from lovasz import wire
from lovasz.client import LossClient, LovaszSoftmax, ServerUnavailableError
from lovasz.client import remote as client_remote
from lovasz.client.shared_memory import Region, Session, places
from lovasz.client.torch import RemoteLoss
from lovasz.server.launch import ServerProcess
from lovasz.spec import weighted_sum
from lovasz.wire import framing

SOFTMAX = LovaszSoftmax()


def tensors(side: int, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, classes, side, side, generator=generator)
    return logits, torch.randint(0, classes, (1, side, side), generator=generator)


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server on a Unix socket and on TCP that takes shared memory."""
    path = tmp_path_factory.mktemp("sharing") / "s"
    with ServerProcess(["--device", "cpu", "--listen", f"unix:{path},127.0.0.1:0", "--shared-memory"]) as server:
        yield server


@pytest.fixture(autouse=True)
def _everything_is_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_remote, "SHARED_BYTES", 0)


# --- Answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", load(), ids=lambda case: case.name)
def test_vectors_hold_through_shared_memory(sharing: ServerProcess, case: Case) -> None:
    with LossClient(sharing.target, transport="shm") as client:
        result = client.compute(case.logits, case.labels, case.loss_spec)
    assert result.loss == pytest.approx(case.loss, rel=1e-6)
    assert np.linalg.norm(np.asarray(result.grad, np.float64) - case.grad) <= 1e-5 * np.linalg.norm(case.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wire_dtype", [None, "float16", "bfloat16"])
@pytest.mark.parametrize("want_grad", [True, False])
def test_the_same_bits_as_over_grpc(
    sharing: ServerProcess, dtype: torch.dtype, wire_dtype: str | None, want_grad: bool
) -> None:
    logits, labels = tensors(120)
    logits = logits.to(dtype).transpose(2, 3)
    answers = []
    for transport in ("shm", "grpc"):
        with LossClient(sharing.target, transport=transport, wire_dtype=wire_dtype) as client:
            answers.append(client.compute(logits, labels, SOFTMAX, want_grad=want_grad))
    assert answers[0].loss == answers[1].loss
    if want_grad:
        assert answers[0].grad.dtype == answers[1].grad.dtype
        assert torch.equal(answers[0].grad, answers[1].grad)
    else:
        assert answers[0].grad is None


def test_auto_takes_shared_memory_where_it_can_be_had(sharing: ServerProcess, server: ServerProcess) -> None:
    for target, sessions in ((sharing.targets[0], 1), (sharing.targets[1], 0)):
        with LossClient(target) as client:
            assert client.compute(*tensors(100), SOFTMAX).loss > 0
            assert metric(sharing, "lovasz_shared_memory_sessions") == sessions
        assert eventually(lambda: metric(sharing, "lovasz_shared_memory_sessions") == 0)


def test_auto_falls_back_where_the_session_is_refused(sharing: ServerProcess, tmp_path: Path) -> None:
    """A socket file that nobody listens on any more, as of a server that was started anew without shared memory."""
    with ServerProcess(["--device", "cpu", "--listen", f"unix:{tmp_path}/s"]) as plain:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left_over:
            left_over.bind(f"{tmp_path}/s{wire.MEMORY_SUFFIX}")
        with LossClient(plain.target) as client:
            assert client.compute(*tensors(100), SOFTMAX).loss == pytest.approx(
                LossClient("inprocess").compute(*tensors(100), SOFTMAX).loss
            )


def test_gradients_stay_what_they_are_when_the_memory_is_used_again(sharing: ServerProcess) -> None:
    with LossClient(sharing.target, transport="shm") as client, LossClient(sharing.target, transport="grpc") as other:
        kept = [client.compute(*tensors(64, seed=seed), SOFTMAX).grad.view(-1)[7:] for seed in range(8)]
        for seed, grad in enumerate(kept):
            assert torch.equal(grad, other.compute(*tensors(64, seed=seed), SOFTMAX).grad.view(-1)[7:])
        del kept, grad
        for seed in range(8):
            client.compute(*tensors(64, seed=seed), SOFTMAX)
        assert metric(sharing, "lovasz_shared_memory_bytes") < 6 * 2 * 4 * 4 * 64 * 64, "memory is not used again"
        last = client.compute(*tensors(64), SOFTMAX).grad
    assert torch.equal(last, LossClient("inprocess").compute(*tensors(64), SOFTMAX).grad), "after the client is closed"


def test_training_in_threads_through_one_client(sharing: ServerProcess) -> None:
    with LossClient(sharing.target, transport="shm") as client, LossClient(sharing.target, transport="grpc") as other:
        pending = [client.submit(*tensors(70 + seed % 3, seed=seed), SOFTMAX) for seed in range(40)]
        for seed, future in enumerate(pending):
            expected = other.compute(*tensors(70 + seed % 3, seed=seed), SOFTMAX)
            assert torch.equal(future.result().grad, expected.grad)


def test_a_loss_module_through_shared_memory(sharing: ServerProcess) -> None:
    grads = []
    for transport in ("shm", "grpc"):
        logits, labels = tensors(90)
        criterion = RemoteLoss(sharing.target, SOFTMAX, transport=transport)
        (3 * criterion(logits.requires_grad_(), labels)).backward()
        criterion.close()
        grads.append(logits.grad)
    assert torch.equal(grads[0], grads[1])


# --- What can go wrong --------------------------------------------------------------------------------------------


def test_shared_memory_needs_a_unix_socket_and_a_server_that_takes_it(server: ServerProcess, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"transport: got 'shm' with the target .*; expected a target unix:/path"):
        LossClient(server.target, transport="shm")
    with ServerProcess(["--device", "cpu", "--listen", f"unix:{tmp_path}/s"]) as plain:
        with LossClient(plain.target, transport="shm") as client, pytest.raises(ServerUnavailableError) as refused:
            client.compute(*tensors(10), SOFTMAX)
        assert "started with --shared-memory?" in str(refused.value)


def test_a_restart_of_the_server_is_ridden_out(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--listen", f"unix:{tmp_path}/s", "--shared-memory"]
    with LossClient(f"unix:{tmp_path}/s", transport="shm") as client:
        with ServerProcess(arguments) as first:
            before = client.compute(*tensors(80), SOFTMAX)
            first.kill()
        with ServerProcess(arguments) as second:
            again = client.compute(*tensors(80), SOFTMAX)
            assert metric(second, "lovasz_shared_memory_sessions") == 1
    assert torch.equal(before.grad, again.grad)


def test_a_second_server_does_not_take_the_place_of_one_that_lives(sharing: ServerProcess) -> None:
    second = ServerProcess(["--device", "cpu", "--listen", sharing.target, "--shared-memory"])
    with pytest.raises(RuntimeError, match="another server is there"), second:
        pass
    with LossClient(sharing.target, transport="shm") as client:
        assert client.compute(*tensors(20), SOFTMAX).loss > 0


class Raw:
    """A caller that says of its memory what it likes."""

    def __init__(self, server: ServerProcess) -> None:
        logits, labels = tensors(40)
        specs = (
            wire.TensorSpec(wire.dtype_named("float32"), tuple(logits.shape)),
            wire.TensorSpec(wire.dtype_named("uint8"), tuple(labels.shape)),
        )
        self.request = wire.Request.checked(weighted_sum(SOFTMAX), *specs, want_grad=True)
        first, second, third, size = places(self.request)
        self.session = Session(server.targets[0].removeprefix("unix:") + wire.MEMORY_SUFFIX, 10)
        self.region = Region(size)
        self.region.array(first, specs[0].shape, specs[0].dtype.numpy)[...] = logits.numpy()
        self.region.array(second, specs[1].shape, specs[1].dtype.numpy)[...] = labels.numpy()
        self.session.share(self.region)
        self.shared = wire.SharedTensors(self.session.name, self.region.number, first, second, third)
        self.channel = grpc.insecure_channel(server.targets[1])
        self.call = self.channel.unary_unary(
            "/lovasz.v1.LossService/Compute",
            request_serializer=framing.UnaryRequest.encode,
            response_deserializer=framing.UnaryResponse.decode,
        )

    def ask(self, logits: bytes = b"", **changes: object) -> framing.UnaryResponse:
        shared = replace(self.shared, **changes)  # type: ignore[arg-type]
        header = replace(self.request, shared=shared).to_proto()
        return self.call(framing.UnaryRequest(header, logits, b""), timeout=30)

    def close(self) -> None:
        self.channel.close()
        self.session.close()
        self.region.close()


@pytest.fixture
def raw(sharing: ServerProcess) -> Iterator[Raw]:
    raw = Raw(sharing)
    yield raw
    assert raw.ask().header.loss > 0, "the server goes on"
    raw.close()
    assert metric(sharing, "lovasz_in_flight_bytes") == 0
    assert metric(sharing, "lovasz_requests_total", code="INTERNAL") == 0
    assert eventually(lambda: metric(sharing, "lovasz_shared_memory_sessions") == 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"region": 10**9}, "shared_tensors.region: got 1000000000; expected the number of a region that is shared"),
        ({"logits_offset": -1}, "shared_tensors.logits_offset: got -1 for 25600 bytes in a region of"),
        ({"labels_offset": 2**62}, f"shared_tensors.labels_offset: got {2**62} for 1600 bytes in a region of"),
        ({"grad_offset": 30_000}, "shared_tensors.grad_offset: got 30000 for 25600 bytes in a region of"),
        ({"logits": b"1234"}, "logits: got 4 bytes beside shared_tensors; expected none"),
    ],
)
def test_memory_that_is_not_there_is_refused_by_name(raw: Raw, changes: dict[str, object], said: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        raw.ask(**changes)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.details().startswith(said)


def test_a_session_that_is_not_there_is_refused(raw: Raw) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        raw.ask(session=b"0123456789abcdef")
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "has ended, or belongs to another server" in refused.value.details()


def test_tensors_that_overlap_change_nothing_but_the_callers_own_answer(raw: Raw) -> None:
    assert raw.ask(grad_offset=raw.shared.logits_offset).header.loss > 0
    raw.region.array(0, (1,), np.dtype(np.float32))[...] = 0.5


def test_memory_is_not_taken_by_a_server_that_shares_none(server: ServerProcess, raw: Raw) -> None:
    with grpc.insecure_channel(server.target) as channel:
        call = channel.unary_unary("/lovasz.v1.LossService/Compute", request_serializer=framing.UnaryRequest.encode)
        header = replace(raw.request, shared=raw.shared).to_proto()
        with pytest.raises(grpc.RpcError) as refused:
            call(framing.UnaryRequest(header, b"", b""))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "this server shares no memory (--shared-memory)" in refused.value.details()


def test_memory_that_is_scribbled_over_and_torn_down_while_it_is_used(sharing: ServerProcess) -> None:
    """Labels and logits change under the server's hands, then the session ends in the middle of calls."""
    for round_ in range(9):
        raw, stop = Raw(sharing), threading.Event()

        def scribble(raw: Raw = raw, stop: threading.Event = stop) -> None:
            random = np.random.default_rng(0)
            everything = raw.region.array(0, (raw.region.nbytes,), np.dtype(np.uint8))
            while not stop.is_set():
                everything[...] = random.integers(0, 256, everything.size, np.uint8)

        thread = threading.Thread(target=scribble)
        thread.start()
        codes = set()
        for call in range(30):
            if call == 20:
                raw.session.close()
            try:
                raw.ask()
            except grpc.RpcError as error:
                codes.add(error.code())
        stop.set()
        thread.join()
        raw.close()
        assert codes <= {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAVAILABLE}
        assert grpc.StatusCode.UNAVAILABLE in codes
        assert eventually(lambda: metric(sharing, "lovasz_shared_memory_sessions") == 0)
        if round_ == 0:  # by now gRPC and the metrics have opened what they keep
            before = Footprint.of(sharing.pid).descriptors
    # gRPC may open one more; a leak in each of the eight further rounds would be eight at least.
    assert eventually(lambda: Footprint.of(sharing.pid).descriptors.total() <= before.total() + 4), (
        f"{before} before, {Footprint.of(sharing.pid).descriptors} after"
    )
    with LossClient(sharing.target, transport="shm") as client:
        assert client.compute(*tensors(20), SOFTMAX).loss > 0
