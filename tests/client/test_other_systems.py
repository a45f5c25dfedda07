"""Client and core need nothing that only Linux has, but for shared memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.fork_server import ForkedServer
from support.imports import REPOSITORY


def test_client_and_core_without_what_only_posix_has(tmp_path: Path) -> None:
    path = f"unix:{tmp_path / 's'}"
    with ForkedServer(["--device", "cpu", "--listen", f"{path},127.0.0.1:0", "--shared-memory"]) as server:
        command = [sys.executable, "-m", "support.without_posix", *reversed(server.targets)]
        ran = subprocess.run(command, cwd=REPOSITORY / "tests", capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"transport: got 'shm' on {sys.platform}; expected Linux\n"
