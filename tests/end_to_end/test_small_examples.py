"""The examples without a server of their own: minimal.py, with a server and without, and compare_losses.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from lovasz.server.launch import ServerProcess

EXAMPLES = Path(__file__).parents[2] / "examples"


def output_of(example: str, *arguments: str) -> str:
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / example), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # So that two runs round alike.
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_minimal_example_learns_and_a_server_changes_no_digit(server: ServerProcess) -> None:
    here = output_of("minimal.py")
    before, after = map(float, re.findall(r"(?:before the training|after it): (\d\.\d+)", here))
    assert before < 0.4
    assert after > 0.6
    assert output_of("minimal.py", "--server", server.target) == here


def test_all_uses_of_the_loss_are_compared() -> None:
    *_, table = output_of("compare_losses.py", "--quick", "--seeds", "0", "1").partition("mIoU on the test set")
    rows = re.findall(r"^(\w.+?) +(0\.\d{3}) +(0\.\d{3}) +0\.\d{3}, 0\.\d{3}$", table, re.MULTILINE)
    assert len(rows) == 6
    start, then_lovasz = rows[0], rows[4]
    assert start[0] == "cross-entropy"
    assert then_lovasz[0] == "cross-entropy, then Lovász"
    assert start[1:] != then_lovasz[1:]
