"""The ten-minute recipe of security.md: its commands run, and lead to a training over mutual TLS with a token."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.imports import REPOSITORY
from support.snippets import snippets_of

PAGE = REPOSITORY / "docs" / "security.md"
SECTION = "In ten minutes: TLS, client certificates and tokens"
COMMANDS = {"lovasz": "-m lovasz.client.cli", "lovasz-server": "-m lovasz.server", "python": ""}
"""The programs that the recipe calls, as arguments of this Python."""
PORT = "50051"


def commands() -> list[str]:
    """The commands of the numbered steps, without those that install the project."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {SECTION}\n")[1].split("\n## ")[0]
    found = [line.strip() for line in section.splitlines() if re.match(r" {7}\S", line)]
    return [line for line in found if not re.match(r"python3 -m venv|pip install", line)]


@pytest.mark.timeout(400)  # A server starts, and a training runs: seconds, but many where the machine is busy.
def test_the_recipe_leads_to_a_training_over_mutual_tls_with_a_token(tmp_path: Path) -> None:
    programs, work = tmp_path / "bin", tmp_path / "clone"
    programs.mkdir()
    work.mkdir()
    (work / "examples").symlink_to(REPOSITORY / "examples")
    for name, arguments in COMMANDS.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
        (programs / name).chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "LOVASZ_METRICS_LISTEN": "127.0.0.1:0", "OMP_NUM_THREADS": "1"}
    said, server = "", None
    try:
        for command in (line.replace(PORT, port) for line in commands()):
            if command.startswith("lovasz-server"):
                server = subprocess.Popen(shlex.split(command), cwd=work, env=environment, stderr=subprocess.DEVNULL)
                continue
            ran = subprocess.run(
                ["bash", "-c", command], cwd=work, env=environment, capture_output=True, text=True, timeout=300
            )
            assert ran.returncode == 0, f"{command}\n{ran.stderr}"
            said += ran.stdout
        assert f"localhost:{port} answers: lovasz" in said
        assert "mIoU on the test set before the training" in said
        (snippet,) = (one for one in snippets_of(PAGE) if one.heading == SECTION)
        code = snippet.changed(PORT, port).code.replace("secrets/", f"{work}/secrets/")
        call = "import torch\nprint(criterion(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4).long()))"
        ran = subprocess.run([sys.executable, "-c", f"{code}\n{call}"], capture_output=True, text=True, timeout=60)
        assert ran.stdout.startswith("tensor("), ran.stderr
        plain = [programs / "lovasz", "ping", f"localhost:{port}"]
        assert b"the server speaks TLS" in subprocess.run(plain, capture_output=True, timeout=60).stderr
    finally:
        if server is not None:
            server.terminate()
            server.wait()
