"""The joint loss trains a network on ranks as one process would; each rank's own loss does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPARE = Path(__file__).parents[2] / "examples" / "compare_ddp.py"


@pytest.mark.timeout(300)
def test_a_short_comparison(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ["--steps", "3", "--ranks", "2", "--timeout", "50", "--plot", str(tmp_path), "--json", str(figures)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # As the ranks have. Small tensors are faster on one thread.
    ended = subprocess.run([sys.executable, str(COMPARE), *options], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(figures.read_text())
    own = found["own losses, 2 ranks"]
    assert own["one_minus_cosine"] > 1e-4
    for joint in (found["joint loss, 2 ranks"], found["process group, 2 ranks"]):
        assert joint["one_minus_cosine"] <= 1e-6
        assert joint["norm_relative"] < 1e-5
        assert own["norm_relative"] > 100 * joint["norm_relative"]
    assert "joint loss, 2 ranks" in ended.stdout
    assert (tmp_path / "joint_digits.png").read_bytes().startswith(b"\x89PNG")


def test_ranks_that_fail_end_it() -> None:
    script = (
        "import compare_ddp as compare; compare.ddp_digits.__file__ = 'no such file'; "
        "compare.train_on_ranks(compare.Way('server', 2), target='', steps=1, timeout=50.0)"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=COMPARE.parent, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "joint loss, 2 ranks: torchrun ended with 1" in ended.stderr
