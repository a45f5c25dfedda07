"""The demo runs, with a server of its own and with one that is there, and reports what the server counted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lovasz.server.launch import ServerProcess

DEMO = Path(__file__).parents[2] / "examples" / "segment_digits.py"


@pytest.mark.parametrize("own_server", [True, False])
def test_a_short_demo(own_server: bool, server: ServerProcess, tmp_path: Path) -> None:
    picture = tmp_path / "digits.png"
    there = [] if own_server else ["--target", server.target, "--metrics-url", server.metrics_url]
    ended = subprocess.run(
        [sys.executable, str(DEMO), "--quick", "--out", str(picture), *there],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # Small tensors are faster on one thread.
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "mean (mIoU)" in ended.stdout
    assert "10 x Compute of cross_entropy+lovasz_softmax: OK" in ended.stdout
    assert "errors      0" in ended.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
