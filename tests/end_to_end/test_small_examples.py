"""The examples without a server of their own: minimal.py (with one, too), compare_losses.py, joint_study.py."""

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


def test_a_study_of_the_joint_loss_keeps_what_it_has_trained(tmp_path: Path) -> None:
    options = ["--quick", "--jobs", "1", "--json", str(tmp_path / "study.json"), "--plot", str(tmp_path)]
    first = output_of("joint_study.py", *options)
    trainings, _, table = first.partition("\n\n")
    assert len(trainings.splitlines()) == 14  # Seven ways, two seeds.
    assert len(re.findall(r"^\| [cL].+ \| [+-]0\.\d{3} \[", table, re.MULTILINE)) == 4
    means = dict(re.findall(r"^\| ([cL][^|]+) \| (0\.\d{3}) ±", table, re.MULTILINE))
    assert len(means) == 7
    assert means["Lovász, own losses"] != means["Lovász, joint"] != means["Lovász, joint micro-batches"]
    assert (tmp_path / "joint_study.png").read_bytes().startswith(b"\x89PNG")
    assert output_of("joint_study.py", *options[:-2]).strip() == table.strip()
