"""How busy the device is, how much of its memory is in use, and whether the memory is enough for the budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch

from lovasz.server.device.host_memory import host_memory
from lovasz.server.device.load import DeviceWatch


def test_the_load_of_the_host_is_known_from_the_second_time_on() -> None:
    watch = DeviceWatch(torch.device("cpu"))
    assert math.isnan(watch.utilization)
    watch.sample()
    assert math.isnan(watch.utilization)
    assert 0 < watch.used_bytes < watch.memory_bytes
    assert watch.memory_bytes == host_memory()[1]
    until = time.monotonic() + 0.1
    while time.monotonic() < until:
        pass
    watch.sample()
    assert 0 < watch.utilization <= 1


def test_the_load_of_a_gpu_is_what_its_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "utilization", {gpu: 37}.__getitem__)
    monkeypatch.setattr(torch.cuda, "mem_get_info", {gpu: (30, 100)}.__getitem__)
    watch = DeviceWatch(gpu)
    watch.sample()
    assert (watch.utilization, watch.used_bytes, watch.memory_bytes) == (0.37, 70, 100)


def fails(error: Exception) -> Callable[[torch.device], int]:
    def fail(device: torch.device) -> int:
        raise error

    return fail


def test_what_cannot_be_read_is_not_a_number_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "utilization", fails(ModuleNotFoundError("nvidia-ml-py is not installed")))
    monkeypatch.setattr(torch.cuda, "mem_get_info", {gpu: (30, 100)}.__getitem__)
    watch = DeviceWatch(gpu)
    watch.sample()
    assert math.isnan(watch.utilization)
    assert watch.used_bytes == 70
    monkeypatch.setattr(torch.cuda, "mem_get_info", fails(RuntimeError("an illegal memory access")))
    watch.sample()
    assert math.isnan(watch.used_bytes)
    assert math.isnan(watch.memory_bytes)
    watch.sample()
    assert [record.message for record in caplog.records] == [
        "the utilization of the device cannot be read",
        "the memory of the device cannot be read",
    ]


def test_a_budget_that_may_need_more_memory_than_there_is_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    total = host_memory()[1]
    cpu, gpu = DeviceWatch(torch.device("cpu")), DeviceWatch(torch.device("cuda", 0))
    cpu.check_budget(1)
    gpu.check_budget(1)
    assert not caplog.records
    cpu.check_budget(total // 2)
    gpu.check_budget(total)
    assert [(record.levelname, record.message.split()[0]) for record in caplog.records] == [
        ("WARNING", "--memory-budget"),
        ("WARNING", "--memory-budget"),
    ]
