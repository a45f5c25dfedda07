"""The kernels compile for a GPU, which needs none: the interpreter runs only the branches that it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CODE = """
import torch
import triton
from benchmarks.core.kernels import TARGET, program_of, source_of
from lovasz.core import LovaszHinge
from lovasz.core.dispatch import _KINDS

# What is compiled first: if one fails, torch's own kernels compute all. And the sort of groups of other sizes.
programs = [program_of(loss, [shape], torch.float32) for loss, shape in _KINDS]
launches = [(program, launch) for program in programs for launch in program.launches]
for pixels in (1, 40, 100, 1000):
    program = program_of(LovaszHinge(), [(1, pixels)], torch.float32)
    launches += [(program, launch) for launch in program.launches if launch.kernel.__name__ == "sort_buckets"]
for program, launch in launches:
    compiled = triton.compile(source_of(program, launch), target=TARGET, options=launch.options)
    assert compiled.asm["cubin"]
print("compiled")
"""


@pytest.mark.timeout(400)
def test_the_kernels_of_small_groups_compile(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)  # Here nothing is interpreted.
    folder = Path(__file__).parents[2]
    command = [sys.executable, "-c", CODE]
    ran = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=380)
    assert (ran.returncode, ran.stdout) == (0, "compiled\n"), ran.stderr
