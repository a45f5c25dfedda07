"""Runs Python code in a new process."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def run_python(code: str) -> str:
    """What the code prints. Every warning is an error."""
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@contextmanager
def hearing_ctrl_c() -> Iterator[None]:
    """Processes that start meanwhile hear Ctrl-C. A shell's background jobs, and what they start, do not.

    Popen's ``preexec_fn`` would make a real fork, after which a gRPC server in this process may answer no more.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
