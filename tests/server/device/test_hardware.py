"""Which device a server computes on."""

from __future__ import annotations

import pytest

from lovasz.server.device.hardware import choose_device
from lovasz.server.errors import DeviceError


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(DeviceError, match=r"--device cuda:99: torch sees \d+ CUDA devices here"):
        choose_device("cuda:99")
