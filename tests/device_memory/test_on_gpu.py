"""Device memory on a GPU: right answers, no byte of a tensor on the host, and all of it back after any death."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from support.gpu import require_gpu
from support.vector_cases import Case, load
from support.waiting import eventually
from torch.profiler import ProfilerActivity, profile

from lovasz.client import LossClient, LovaszSoftmax
from lovasz.client.torch import RemoteLoss
from lovasz.device_memory.cuda import CudaDriver
from lovasz.device_memory.driver import DriverError
from lovasz.device_memory.mapping import create
from lovasz.device_memory.mapping import load as load_memory

pytestmark = pytest.mark.gpu

PACKAGES = ("cuda.bindings", "prometheus_client", "grpc_health", "grpc_reflection")
MIB = 1 << 20
KEPT_BYTES = 64 * MIB
"""How much more of the GPU's memory may be in use afterwards: what CUDA loads at a first use."""
SOFTMAX = LovaszSoftmax()


def is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture(scope="module", autouse=True)
def _gpu_and_packages() -> None:
    require_gpu()
    missing = [package for package in PACKAGES if not is_there(package)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: see make gpu-packages")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, _gpu_and_packages: None) -> Iterator[str]:
    """A server process on the first GPU."""
    from lovasz.server.launch import ServerProcess

    path = f"unix:{tmp_path_factory.mktemp('gpu')}/s"
    with ServerProcess(["--device", "cuda", "--listen", path, "--shared-memory"]):
        yield path


def tensors(side: int, classes: int = 19, device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(1, classes, side, side, generator=torch.Generator().manual_seed(side))
    labels = torch.randint(0, classes, (1, side, side), generator=torch.Generator().manual_seed(side))
    return logits.to(device), labels.to(device)


def used_bytes() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_memory_is_made_handed_over_and_freed() -> None:
    torch.zeros(1, device="cuda")
    driver = CudaDriver()
    create_and_drop = [create(driver, 0, MIB)]
    os.close(create_and_drop.pop()[1])
    before = used_bytes()
    made, descriptor = create(driver, 0, 100 * MIB)
    content = driver.tensor(made.address, made.nbytes, 0, made)
    content.fill_(7)
    torch.cuda.synchronize()
    loaded = load_memory(driver, descriptor, made.nbytes, 0)
    os.close(descriptor)
    assert (loaded.owner, loaded.nbytes) == (0, made.nbytes)
    copied = torch.zeros(made.nbytes, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    driver.copy(copied.data_ptr(), loaded.address, made.nbytes, 0, torch.cuda.current_stream().cuda_stream)
    assert bool((copied == 7).all())
    assert used_bytes() >= before + 100 * MIB
    del made, loaded, content, copied
    assert used_bytes() < before + 10 * MIB


def test_what_is_no_such_memory_is_refused() -> None:
    """In a thread in which nothing has used the GPU, as those that read packets are."""
    torch.zeros(1, device="cuda")
    driver = CudaDriver()
    made, descriptor = create(driver, 0, MIB)
    host, nothing = os.memfd_create("host"), os.open("/dev/null", os.O_RDWR)
    os.ftruncate(host, made.nbytes)
    refused: list[DriverError] = []

    def try_all() -> None:
        for given, nbytes in ((descriptor, 2 * made.nbytes), (host, made.nbytes), (nothing, made.nbytes)):
            try:
                load_memory(driver, given, nbytes, 0)
            except DriverError as error:
                refused.append(error)
        assert load_memory(driver, descriptor, made.nbytes, 0).nbytes == made.nbytes

    with ThreadPoolExecutor(1) as thread:
        thread.submit(try_all).result()
    for one in (descriptor, host, nothing):
        os.close(one)
    assert len(refused) == 3


@pytest.mark.parametrize("case", load(), ids=lambda case: case.name)
def test_vectors_hold_through_device_memory(target: str, case: Case) -> None:
    with LossClient(target) as client:
        result = client.compute(
            torch.from_numpy(case.logits).cuda(), torch.from_numpy(case.labels).cuda(), case.loss_spec
        )
    assert result.timing.transport == "device"
    assert result.grad.is_cuda
    assert result.loss == pytest.approx(case.loss, rel=1e-6)
    error = np.linalg.norm(result.grad.cpu().numpy().astype(np.float64) - case.grad)
    assert error <= 2e-5 * np.linalg.norm(case.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_same_bits_as_over_grpc(target: str, dtype: torch.dtype) -> None:
    logits, labels = tensors(200)
    grads = []
    for transport in ("auto", "grpc"):
        with LossClient(target, transport=transport) as client:
            grads.append(client.compute(logits.to(dtype).transpose(2, 3), labels, SOFTMAX).grad)
    assert torch.equal(grads[0], grads[1])


def test_gradients_stay_what_they_are_while_others_are_computed(target: str) -> None:
    with LossClient(target) as client, LossClient(target, transport="grpc") as other:
        kept = {side: client.compute(*tensors(side), SOFTMAX).grad for side in range(60, 90)}
        for side, grad in kept.items():
            assert torch.equal(grad, other.compute(*tensors(side), SOFTMAX).grad)


def test_no_byte_of_a_tensor_is_on_the_host(tmp_path: Path) -> None:
    """Trainer and server in one process here, so that one profiler sees the copies of both."""
    from lovasz.server.config import ServerConfig
    from lovasz.server.server import Server

    config = ServerConfig(listen=f"unix:{tmp_path}/s", metrics_listen="127.0.0.1:0", device="cuda", shared_memory=True)
    server = Server(config, threading.Event())
    assert server.start()
    try:
        logits, labels = tensors(512)
        leaf = logits.requires_grad_()
        criterion = RemoteLoss(f"unix:{tmp_path}/s", SOFTMAX)
        for _ in range(4):
            criterion(leaf, labels).backward()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            criterion(leaf, labels).backward()
            torch.cuda.synchronize()
        assert criterion.result is not None
        assert criterion.result.timing is not None
        assert criterion.result.timing.transport == "device"
        criterion.close()
    finally:
        server.stop()
    trace = tmp_path / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    copies = [(one["name"], one["args"]["bytes"]) for one in events if one.get("cat") == "gpu_memcpy"]
    assert sum(size for name, size in copies if "DtoD" in name) >= 3 * logits.nbytes
    largest = max((size for name, size in copies if "DtoD" not in name), default=0)
    assert largest < labels.numel(), copies


CLIENT = """
import sys, threading, torch
from lovasz.client import LossClient, LovaszSoftmax
client, phase = LossClient(sys.argv[2]), sys.argv[1]
logits = torch.randn(1, 19, 1500, 1500, device="cuda")
labels = torch.zeros(1, 1500, 1500, dtype=torch.uint8, device="cuda")
results = [client.compute(logits, labels, LovaszSoftmax())]
assert results[0].timing.transport == "device"
print("there", flush=True)
while phase == "calling":
    results[0] = client.compute(logits, labels, LovaszSoftmax())
threading.Event().wait(60)
"""


@pytest.mark.parametrize(("phase", "after"), [("holding", 0.0), *(("calling", 0.003 * k) for k in range(6))])
def test_a_client_that_is_killed_leaves_no_memory_behind(target: str, phase: str, after: float) -> None:
    logits, labels = tensors(1500)
    with LossClient(target) as client:
        for _ in range(6):  # What the server keeps for such requests is there from here on, for both of its streams.
            client.compute(logits, labels.to(torch.uint8), SOFTMAX)
    del logits, labels
    before = used_bytes()
    command = [sys.executable, "-c", CLIENT, phase, target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        time.sleep(after)
        process.kill()
    assert eventually(lambda: used_bytes() < before + KEPT_BYTES)
    with LossClient(target) as client:
        assert client.compute(*tensors(100), SOFTMAX).timing.transport == "device"


def test_a_server_that_is_killed_leaves_no_memory_behind_and_is_followed_by_another(tmp_path: Path) -> None:
    from lovasz.server.launch import ServerProcess

    path, (logits, labels) = f"unix:{tmp_path}/s", tensors(1500)
    torch.cuda.synchronize()
    before = used_bytes()
    with LossClient(path) as client:
        for _ in range(2):
            with ServerProcess(["--device", "cuda", "--listen", path, "--shared-memory"]) as server:
                result = client.compute(logits, labels, SOFTMAX)
                assert result.timing.transport == "device"
                pending = client.submit(logits, labels, SOFTMAX, timeout=5)
                server.kill()
            assert pending.exception() is not None or pending.result().loss == result.loss
    del result, pending
    assert eventually(lambda: used_bytes() < before + KEPT_BYTES)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_trainer_on_another_gpu(target: str) -> None:
    logits, labels = tensors(512, device="cuda:1")
    with LossClient(target) as client:
        result = client.compute(logits, labels, SOFTMAX)
    way = "device" if torch.cuda.can_device_access_peer(0, 1) else "shm"
    assert (result.timing.transport, result.grad.device) == (way, logits.device)
    with LossClient(target, transport="grpc") as client:
        assert torch.equal(result.grad, client.compute(logits, labels, SOFTMAX).grad)
