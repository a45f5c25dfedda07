"""What a device keeps is given back once, when it was idle for a while."""

from __future__ import annotations

import time

import pytest
import torch

from lovasz.server.device import kept_memory
from lovasz.server.device.kept_memory import IDLE_SECONDS, KeptMemory


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When memory was given back."""
    freed: list[float] = []
    monkeypatch.setattr(kept_memory, "give_memory_back", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(time.monotonic()))
    return freed


def test_memory_is_freed_once_after_each_time_of_work(freed: list[float]) -> None:
    memory, now = KeptMemory(torch.device("cuda")), time.monotonic()
    memory.free_if_idle(float("-inf"))
    memory.free_if_idle(now)
    memory.free_if_idle(now - IDLE_SECONDS + 5)
    assert len(freed) == 0
    for _ in range(3):
        memory.free_if_idle(now - IDLE_SECONDS)
    assert len(freed) == 1


def test_memory_is_freed_again_after_more_work(freed: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_memory, "IDLE_SECONDS", 0.0)
    memory = KeptMemory(torch.device("cuda"))
    for number in (1, 2, 3):
        memory.free_if_idle(time.monotonic())
        assert len(freed) == number


def test_a_cpu_keeps_nothing(freed: list[float]) -> None:
    memory = KeptMemory(torch.device("cpu"))
    memory.free()
    memory.free_if_idle(time.monotonic() - 2 * IDLE_SECONDS)
    assert not freed
