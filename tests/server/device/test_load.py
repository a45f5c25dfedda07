"""How busy the device is, and how much of its memory is in use."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
import torch

from lovasz.server.device.load import DeviceWatch


def test_the_load_of_the_host_is_known_from_the_second_time_on() -> None:
    watch = DeviceWatch(torch.device("cpu"))
    assert math.isnan(watch.utilization)
    watch.sample()
    assert math.isnan(watch.utilization)
    assert 0 < watch.used_bytes < watch.memory_bytes
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
