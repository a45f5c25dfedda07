"""The check of a device: its verdict, and what the log says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lovasz.core.dispatch import submit
from lovasz.server.device import self_test
from lovasz.server.device.self_test import SelfTest

FULL = "the device has no memory left for its check"


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """The device raises the last of these while there are any."""
    faults: list[Exception] = []

    def fail_or_submit(*arguments: Any) -> Any:
        if faults:
            raise faults[-1]
        return submit(*arguments)

    monkeypatch.setattr(self_test, "submit", fail_or_submit)
    return faults


@pytest.fixture
def check() -> SelfTest:
    return SelfTest(torch.device("cpu"))


@pytest.mark.parametrize(
    "full", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")], ids=str
)
def test_a_device_without_memory_keeps_its_verdict_and_is_warned_of_once(
    check: SelfTest, faults: list[Exception], full: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    faults.append(full)
    check.run()
    assert not check.passed  # It has computed nothing yet.
    faults.clear()
    check.run()
    assert check.passed
    faults.append(full)
    caplog.clear()
    for _ in range(3):
        before = check.ended
        check.run()
        assert check.passed
        assert check.ended > before
    assert caplog.messages == [FULL]
    faults.clear()
    check.run()
    faults.append(full)
    check.run()
    assert caplog.messages == [FULL] * 2


def test_a_device_without_memory_that_was_broken_stays_so(check: SelfTest, faults: list[Exception]) -> None:
    check.run()
    faults.append(RuntimeError("CUDA error: unspecified launch failure"))
    check.run()
    assert not check.passed
    faults.append(torch.OutOfMemoryError("CUDA out of memory"))
    check.run()
    assert not check.passed
    faults.clear()
    check.run()
    assert check.passed
