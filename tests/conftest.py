"""Fixtures that several test directories share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.gpu import require_gpu

from lovasz.server.launch import ServerProcess


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def torch_device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that torch's own path runs on."""
    if request.param == "cuda":
        require_gpu()
    return torch.device(request.param)


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """For what only a GPU can show; goes with ``@pytest.mark.gpu``."""
    require_gpu()
    return torch.device("cuda")


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts torch's number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """A real server on the CPU, in a process of its own, for tests that leave it as they found it."""
    with ServerProcess(["--device", "cpu"]) as process:
        yield process
