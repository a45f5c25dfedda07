"""Runs Python code in a new process."""

from __future__ import annotations

import subprocess
import sys


def run_python(code: str) -> str:
    """What the code prints. Every warning is an error."""
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()
