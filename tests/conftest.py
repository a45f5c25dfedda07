"""Fixtures that several test directories share."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator

import pytest
import torch
from support.fork_server import ForkedServer
from support.gpu import require_gpu
from support.ways import MISSING_WAYS

from lovasz.server.launch import ServerProcess

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]


def pytest_report_header() -> list[str]:
    return [f"no test of {way}, which needs {what}" for way, what in MISSING_WAYS.items()]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None]:
    """Collects tests without collecting garbage: there is little, and a million objects to look at. They all stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the tests that may take longest first: else the last of them runs when all other workers have ended."""
    usual = float(config.getini("timeout"))

    def is_long(item: pytest.Item) -> bool:
        timeout = item.get_closest_marker("timeout")
        return timeout is not None and timeout.args[0] > usual

    items.sort(key=lambda item: not is_long(item))


@pytest.fixture(scope="session", params=DEVICES)
def torch_device(request: pytest.FixtureRequest) -> torch.device:
    """Every device here that torch's own path runs on."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """For what only a GPU can show; goes with ``@pytest.mark.gpu``."""
    require_gpu()
    return torch.device("cuda")


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """A real server on the CPU, in a process of its own, for tests that leave it as they found it."""
    with ForkedServer(["--device", "cpu"]) as process:
        yield process
