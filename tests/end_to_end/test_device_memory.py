"""Tensors on a device that stay there: a stand-in's devices, whose memory is host memory, and a real server."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.device_server import device_server
from support.fork_server import Forked
from support.host_driver import NAME, HostDriver
from support.imports import REPOSITORY
from support.late_socket import late_socket
from support.scrape import metric
from support.torch_tensors import tensors
from support.vector_cases import Case, load
from support.waiting import eventually

from lovasz.client import Joint, LossClient, LovaszSoftmax, cli, device_memory, devices
from lovasz.client import joint as client_joint
from lovasz.client.regions import Shared
from lovasz.client.shared_memory import Session, SharedMemory
from lovasz.client.torch import RemoteLoss
from lovasz.device_memory.driver import DriverError
from lovasz.server.launch import ServerProcess

SOFTMAX = LovaszSoftmax()


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server on device 0 that cannot access device 2."""
    path = tmp_path_factory.mktemp("sharing") / "s"
    with device_server("--listen", f"unix:{path},127.0.0.1:0", count=3, strangers=((0, 2),)) as server:
        yield server


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> HostDriver:
    """This process's driver, for which tensors on the CPU are on device 0."""
    driver = HostDriver(3)
    monkeypatch.setattr(devices, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(device_memory, "open_driver", lambda: driver)
    return driver


def shared_bytes(server: ServerProcess) -> float:
    return metric(server, "lovasz_shared_device_memory_bytes")


def completed(server: ServerProcess) -> float:
    return metric(server, "lovasz_joint_groups_total", outcome="completed")


@pytest.mark.parametrize("case", load(), ids=lambda case: case.name)
def test_vectors_hold_through_device_memory(sharing: ServerProcess, driver: HostDriver, case: Case) -> None:
    logits, labels = torch.from_numpy(case.logits), torch.from_numpy(case.labels)
    with LossClient(sharing.target, transport="shm") as client:
        result = client.compute(logits, labels, case.loss_spec)
        assert shared_bytes(sharing) > 0
    case.check(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wire_dtype", [None, "float16"])
@pytest.mark.parametrize("want_grad", [True, False])
def test_the_same_bits_as_over_grpc(
    sharing: ServerProcess, driver: HostDriver, dtype: torch.dtype, wire_dtype: str | None, want_grad: bool
) -> None:
    logits, labels = tensors(30)
    logits = logits.to(dtype).transpose(2, 3)
    answers = []
    for transport in ("auto", "grpc"):
        with LossClient(sharing.target, transport=transport, wire_dtype=wire_dtype) as client:
            answers.append(client.compute(logits, labels, SOFTMAX, want_grad=want_grad))
            assert (shared_bytes(sharing) > 0) is (transport == "auto")
        assert eventually(lambda: shared_bytes(sharing) == 0)
    assert [answer.timing.transport for answer in answers] == ["device", "grpc"]
    assert answers[0].loss == answers[1].loss
    if want_grad:
        assert answers[0].grad.dtype == answers[1].grad.dtype
        assert torch.equal(answers[0].grad, answers[1].grad)
    else:
        assert answers[0].grad is None


def test_a_call_that_does_not_fit_on_the_socket_is_made_over_grpc(
    sharing: ServerProcess, driver: HostDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "takes", lambda *_: False)
    with LossClient(sharing.target) as client:
        result = client.compute(*tensors(30), SOFTMAX)
    assert result.timing.transport == "device+grpc"
    assert torch.equal(result.grad, LossClient("inprocess").compute(*tensors(30), SOFTMAX).grad)


@pytest.mark.parametrize("labels", ["int8", "uint16", "float32", "bool", "numpy"])
def test_labels_of_every_type(sharing: ServerProcess, driver: HostDriver, labels: str) -> None:
    logits, targets = tensors(20, classes=2)
    given = targets.numpy() if labels == "numpy" else targets.to(getattr(torch, labels))
    with LossClient(sharing.target) as client:
        result = client.compute(logits, given, SOFTMAX)
        assert shared_bytes(sharing) > 0
    assert torch.equal(result.grad, LossClient("inprocess").compute(logits, targets, SOFTMAX).grad)


def test_memory_is_used_again_once_a_gradient_is_dropped(sharing: ServerProcess, driver: HostDriver) -> None:
    own = LossClient("inprocess")
    with LossClient(sharing.target) as client:
        kept = [client.compute(*tensors(64, seed=seed), SOFTMAX).grad.view(-1)[7:] for seed in range(5)]
        for seed, grad in enumerate(kept):
            assert torch.equal(grad, own.compute(*tensors(64, seed=seed), SOFTMAX).grad.view(-1)[7:])
        del kept, grad
        before = driver.in_use
        for seed in range(8):
            client.compute(*tensors(64, seed=seed), SOFTMAX)
        assert driver.in_use <= before
        last = client.compute(*tensors(64), SOFTMAX).grad
    assert eventually(lambda: shared_bytes(sharing) == 0)
    assert torch.equal(last, own.compute(*tensors(64), SOFTMAX).grad), "after the client is closed"


def test_a_loss_module_and_threads_through_one_client(sharing: ServerProcess, driver: HostDriver) -> None:
    own = LossClient("inprocess")
    with LossClient(sharing.target) as client:
        logits, labels = tensors(40)
        (3 * RemoteLoss(client, SOFTMAX)(logits.requires_grad_(), labels)).backward()
        assert torch.equal(logits.grad, 3 * own.compute(*tensors(40), SOFTMAX).grad)
        pending = [client.submit(*tensors(20 + seed % 3, seed=seed), SOFTMAX) for seed in range(30)]
        for seed, future in enumerate(pending):
            assert torch.equal(future.result().grad, own.compute(*tensors(20 + seed % 3, seed=seed), SOFTMAX).grad)


def test_ping_tells_the_way_of_tensors_on_a_gpu(sharing: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ping", sharing.target, "--count", "1"]) == 0
    ways = [line.split(None, 1) for line in capsys.readouterr().out.splitlines() if "header and answer" in line]
    assert ways == [
        ["tensors", "through shared memory, with header and answer on its socket"],
        ["on", "a GPU    through device memory, with header and answer on the shared-memory socket"],
    ]


def test_bench_with_tensors_on_a_device(sharing: ServerProcess, driver: HostDriver, tmp_path: Path) -> None:
    """``cpu:0``: tensors of torch, which are in the stand-in's memory; without it, bench sends arrays of NumPy."""
    short = ["--shape", "1x3x60x60", "--duration", "0.1", "--warmup", "0"]
    for device, made in (("cpu", False), ("cpu:0", True)):
        assert cli.main(["bench", sharing.target, "--device", device, "--json", f"{tmp_path}/json", *short]) == 0
        figures = json.loads((tmp_path / "json").read_text())
        assert (figures["device"], figures["combinations"][0]["way"]) == (device, "device" if made else "shm")


def test_ranks_of_a_joint_step_on_several_devices(sharing: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 is on the server's device, rank 1 on one that it can access, rank 2 on one that it cannot."""
    monkeypatch.setattr(devices, "DEVICE_TYPE", "cpu")
    drivers, opened = [HostDriver(3 - rank, first=rank) for rank in range(3)], threading.local()
    monkeypatch.setattr(device_memory, "open_driver", lambda: opened.driver)
    parts, results = [tensors(30, seed=rank) for rank in range(3)], {}

    def step(rank: int) -> None:
        opened.driver = drivers[rank]
        with LossClient(sharing.target) as client:
            results[rank] = client.compute(*parts[rank], SOFTMAX, joint=Joint("run", rank, 3, step=0))

    ranks = [threading.Thread(target=step, args=(rank,)) for rank in range(3)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    whole = LossClient("inprocess").compute(*(torch.cat(tensor) for tensor in zip(*parts, strict=True)), SOFTMAX)
    assert torch.equal(torch.cat([results[rank].grad for rank in range(3)]), whole.grad)
    assert {results[rank].loss for rank in range(3)} == {whole.loss}
    assert [bool(driver.made) for driver in drivers] == [True, True, False]


@pytest.mark.parametrize("ways", [("auto", "grpc"), ("grpc", "auto"), ("auto", "auto")])
def test_a_rank_that_asks_again_gets_its_answer_by_another_way(
    sharing: ServerProcess, driver: HostDriver, monkeypatch: pytest.MonkeyPatch, ways: tuple[str, str]
) -> None:
    """The retry of a call whose answer was lost: in other memory, or over gRPC."""
    monkeypatch.setattr(client_joint.os, "urandom", lambda count: b"c" * count)
    logits, labels = tensors(30)
    joint, before, grads = Joint("+".join(ways), 0, 1, step=0), completed(sharing), []
    for way in ways:
        with LossClient(sharing.target, transport=way) as client:
            result = client.compute(logits, labels.byte(), SOFTMAX, joint=joint)
            assert (result.timing.transport == "device") is (way == "auto")
            grads.append(result.grad)
    assert torch.equal(grads[0], grads[1])
    assert completed(sharing) == before + 1


# --- Where there is none ------------------------------------------------------------------------------------------


class NoDriver(HostDriver):
    def granularity(self, device: int) -> int:
        raise DriverError("cuMemGetAllocationGranularity", "CUDA_ERROR_NOT_SUPPORTED")


def no_driver() -> HostDriver:
    raise DriverError("cuInit", "CUDA_ERROR_NO_DEVICE")


@pytest.mark.parametrize(
    ("open_driver", "reason"),
    [
        (lambda: HostDriver(1, first=2), "the server cannot reach cpu, GPU-00000000-0000-0000-0000-000000000002"),
        (lambda: HostDriver(1, first=9), "the server cannot reach cpu, GPU-00000000-0000-0000-0000-000000000009"),
        (lambda: HostDriver(memory_bytes=1), "cuMemCreate: CUDA_ERROR_OUT_OF_MEMORY"),
        (lambda: NoDriver(1), "cuMemGetAllocationGranularity: CUDA_ERROR_NOT_SUPPORTED"),
        (no_driver, "cuInit: CUDA_ERROR_NO_DEVICE"),
    ],
)
def test_without_device_memory_tensors_go_through_shared_memory_and_the_log_says_why_once(
    sharing: ServerProcess,
    driver: HostDriver,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    open_driver: object,
    reason: str,
) -> None:
    monkeypatch.setattr(device_memory, "open_driver", open_driver)
    with caplog.at_level(logging.WARNING), LossClient(sharing.target) as client:
        for _ in range(3):
            result = client.compute(*tensors(150), SOFTMAX)
        assert metric(sharing, "lovasz_shared_memory_bytes") > 0
        assert shared_bytes(sharing) == 0
    assert result.timing.transport == "shm"
    assert torch.equal(result.grad, LossClient("inprocess").compute(*tensors(150), SOFTMAX).grad)
    (told,) = (record.getMessage() for record in caplog.records)
    assert told == f"device memory is not used ({reason}): tensors go through the host's memory"


def test_a_client_does_not_look_for_more_memory_at_each_call(
    sharing: ServerProcess, driver: HostDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look takes time, and frees what torch keeps for the trainer."""
    looks = []
    monkeypatch.setattr(device_memory, "open_driver", lambda: HostDriver(memory_bytes=1))
    monkeypatch.setattr(SharedMemory, "settle", lambda self: looks.append(self))
    with LossClient(sharing.target) as client:
        ways = {client.compute(*tensors(50), SOFTMAX).timing.transport for _ in range(5)}
    assert (ways, len(looks)) == ({"shm"}, 1)


def test_a_gradient_that_outlives_its_client_is_freed_when_it_is_dropped(
    sharing: ServerProcess, driver: HostDriver
) -> None:
    with LossClient(sharing.target) as client:
        result = client.compute(*tensors(50), SOFTMAX)
    assert torch.equal(result.grad, LossClient("inprocess").compute(*tensors(50), SOFTMAX).grad)
    del result
    gc.collect()
    assert (client.target, driver.in_use) == (sharing.target, (0, 0))


def test_a_forked_process_that_closes_the_client_leaves_the_session_to_its_parent(sharing: ServerProcess) -> None:
    code = f"""
import os, warnings
from support.host_driver import HostDriver
from support.torch_tensors import tensors
from lovasz.client import LossClient, LovaszSoftmax, device_memory, devices
warnings.simplefilter("ignore")  # Python warns of forks of processes with threads.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
driver, devices.DEVICE_TYPE = HostDriver(1), "cpu"
device_memory.open_driver = lambda: driver
client = LossClient({sharing.target!r})
for turn in range(3):
    assert client.compute(*tensors(30), LovaszSoftmax()).timing.transport == "device"
    if not (child := os.fork()):
        client.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
client.close()
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY / "tests", capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("transport", ["auto", "shm"])
def test_a_server_that_takes_less_than_it_said_gets_the_tensors_in_another_way(
    sharing: ServerProcess,
    driver: HostDriver,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    transport: str,
) -> None:
    """Its driver refuses the memory, as that of another MIG instance may do."""
    monkeypatch.setattr(HostDriver, "export", lambda self, handle: os.memfd_create("no device memory"))
    with caplog.at_level(logging.WARNING), LossClient(sharing.target, transport=transport) as client:
        results = [client.compute(*tensors(40), SOFTMAX) for _ in range(3)]
        assert shared_bytes(sharing) == 0
    assert [result.timing.transport for result in results] == ["shm"] * 3
    for result in results:
        assert torch.equal(result.grad, LossClient("inprocess").compute(*tensors(40), SOFTMAX).grad)
    (told,) = (record.getMessage() for record in caplog.records)
    assert "cuMemImportFromShareableHandle: CUDA_ERROR_INVALID_VALUE" in told


# --- Deaths -------------------------------------------------------------------------------------------------------


def test_the_death_of_a_server_is_ridden_out(driver: HostDriver, tmp_path: Path) -> None:
    """Between calls, and in the middle of one."""
    large = tensors(700, classes=19)
    with LossClient(f"unix:{tmp_path}/s") as client:
        with device_server("--listen", f"unix:{tmp_path}/s") as first:
            before = client.compute(*tensors(30), SOFTMAX)
            pending = client.submit(*large, SOFTMAX)
            assert eventually(lambda: metric(first, "lovasz_in_flight_requests") > 0 or pending.done())
            first.kill()
        with device_server("--listen", f"unix:{tmp_path}/s") as second:
            answer = pending.result()
            again = client.compute(*tensors(30), SOFTMAX)
            assert shared_bytes(second) > 0
    assert {result.timing.transport for result in (before, answer, again)} == {"device"}
    assert torch.equal(before.grad, again.grad)
    assert torch.equal(answer.grad, LossClient("inprocess").compute(*large, SOFTMAX).grad)


def test_a_server_that_starts_between_two_looks_of_a_client_gets_tensors_on_the_device(
    sharing: ServerProcess, driver: HostDriver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A call is ready when its server dies; it is made while the next one starts."""
    with LossClient(sharing.target) as client:
        client.compute(*tensors(30), SOFTMAX)
        kept = client.compute(*tensors(30), SOFTMAX).grad  # So that the next call has memory that is not shared yet.
        share = SharedMemory.share
        with late_socket(sharing, monkeypatch) as asked:

            def share_after_a_death(shared: SharedMemory, region: Shared, timeout: float) -> Session:
                if not asked and shared._session is not None:
                    shared._session.close()
                return share(shared, region, timeout)

            monkeypatch.setattr(SharedMemory, "share", share_after_a_death)
            answers = [client.compute(*tensors(30), SOFTMAX) for _ in range(2)]
    assert [answer.timing.transport for answer in answers] == ["device", "device"]
    assert torch.equal(answers[0].grad, kept)
    assert len(asked) == 1
    assert not [record for record in caplog.records if record.name.startswith("lovasz.client")]


def test_a_client_asks_for_device_memory_no_longer_than_its_call_may_take(
    sharing: ServerProcess, driver: HostDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, asked = SharedMemory.session, []

    def timed(shared: SharedMemory, timeout: float) -> Session:
        asked.append(timeout)
        return session(shared, timeout)

    monkeypatch.setattr(SharedMemory, "session", timed)
    with LossClient(sharing.target) as client:
        assert client.compute(*tensors(30), SOFTMAX, timeout=20).timing.transport == "device"
    assert len(asked) == 1
    assert 0 < asked[0] <= 20


def mapped(server: ServerProcess) -> int:
    return Path(f"/proc/{server.pid}/maps").read_text().count(NAME)


CLIENT = """
import sys, threading; sys.path.insert(0, sys.argv[1])
import torch
from support.host_driver import NAME, HostDriver
from lovasz.client import Joint, LossClient, LovaszSoftmax, cli, device_memory, devices
devices.DEVICE_TYPE, device_memory.open_driver = "cpu", HostDriver
client, phase = LossClient(sys.argv[3]), sys.argv[2]
joint = Joint("run", 0, 2, step=0) if phase == "waiting" else None
side = 40 if phase == "holding" else 1000
logits, labels = torch.randn(1, 19, side, side), torch.zeros(1, side, side, dtype=torch.uint8)
if phase == "holding":
    result = client.compute(logits, labels, LovaszSoftmax())
print("there", flush=True)
if phase == "holding":
    threading.Event().wait(60)
client.compute(logits, labels, LovaszSoftmax(), joint=joint)
"""


@pytest.mark.parametrize(("phase", "after"), [("holding", 0.0), ("calling", 0.1), ("calling", 0.4), ("waiting", 0.3)])
def test_a_client_that_is_killed_leaves_nothing_behind(sharing: ServerProcess, phase: str, after: float) -> None:
    command = [sys.executable, "-c", CLIENT, str(Path(__file__).parents[1]), phase, sharing.target]
    with Forked(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        if phase == "holding":
            assert mapped(sharing) == 1
        time.sleep(after)  # Before, during or after the computation, as it comes.
        process.kill()
    names = ("in_flight_bytes", "in_flight_requests", "shared_memory_sessions", "shared_memory_bytes")
    assert eventually(lambda: all(metric(sharing, f"lovasz_{name}") == 0 for name in names))
    assert eventually(lambda: mapped(sharing) == 0)
    assert metric(sharing, "lovasz_requests_total", code="INTERNAL") == 0
