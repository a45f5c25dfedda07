"""The cache of compiled functions: a cut file, a full disk. The server says so, compiles, and serves."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.fork_server import ForkedServer
from support.messages import LOSS, tensors
from support.processes import run_python

from lovasz.client import LossClient
from lovasz.core import compute
from lovasz.core.backends.numba import binary
from lovasz.server.launch import ServerProcess


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of this process's cache, which servers that start from now on use."""
    with ForkedServer(["--device", "cpu"]):
        pass  # Fills it.
    warm = Path(binary.prepare._cache.cache_path)  # type: ignore[attr-defined]
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    folder = Path(run_python("from lovasz.core.backends.numba import binary; print(binary.prepare._cache.cache_path)"))
    assert folder.is_relative_to(tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    for file in warm.glob("*.nb?"):
        shutil.copy(file, folder)
    return folder


def serves(server: ServerProcess) -> bool:
    """Whether it computes a known loss right to the bit."""
    logits, labels = tensors(64)
    known = compute(logits, labels, LOSS)
    with LossClient(server.target) as client:
        result = client.compute(logits, labels, LOSS)
    return result.loss == known.loss and np.array_equal(np.asarray(result.grad), np.asarray(known.grad))


def said(server: ServerProcess, what: str) -> list[dict[str, object]]:
    return [line for line in server.log if what in str(line["event"])]


def test_files_that_were_cut_short_are_named_and_made_anew(cache: Path) -> None:
    for ending, function in (("nbi", "add_losses"), ("nbc", "prepare")):
        files = sorted(cache.glob(f"binary.{function}-*.{ending}"))
        assert files
        for file in files:
            file.write_bytes(file.read_bytes()[:40])
    with ServerProcess(["--device", "cpu"]) as server:
        assert serves(server)
        lines = said(server, "cannot be read")
        assert {str(line["files"]).partition("-")[0] for line in lines} == {"binary.add_losses", "binary.prepare"}
        assert {(line["folder"], line["level"]) for line in lines} == {(str(cache), "warning")}
    with ServerProcess(["--device", "cpu"]) as server:
        assert not said(server, "cannot be read")


def test_a_full_disk_costs_the_cache_and_nothing_else(cache: Path) -> None:
    for file in cache.glob("binary.add_losses-*"):
        file.unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))  # The server inherits it: its writes to files fail.
    try:
        server = ServerProcess(["--device", "cpu"])
        server.__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    try:
        assert serves(server)
        assert {line["folder"] for line in said(server, "cannot be written")} == {str(cache)}
    finally:
        server.stop()
    assert not list(cache.glob("*.tmp.*"))
