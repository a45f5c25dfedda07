"""Folders of temporary files: those of killed servers are removed, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lovasz.server.transport.private_folder import PrivateFolder

KILLED = """
import os, signal
from lovasz.server.transport.private_folder import PrivateFolder
folder = PrivateFolder()
open(os.path.join(folder.path, "0"), "x").close()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_killed_servers_have_left_is_removed_and_nothing_else(parent: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED], env={**os.environ, "TMPDIR": str(parent)}, timeout=60)
    (left,) = os.listdir(parent)
    used = PrivateFolder()
    assert os.listdir(parent) == [os.path.basename(used.path)] != [left]
    others = ["lovasz-7", "data"]
    for name in others:
        (parent / name).mkdir()
    (parent / "lovasz-grpc-link").symlink_to(parent / "data")
    another = PrivateFolder()
    assert os.path.isdir(used.path)
    another.remove()
    used.remove()
    assert sorted(os.listdir(parent)) == sorted([*others, "lovasz-grpc-link"])


def test_a_folder_is_reached_by_this_user_alone() -> None:
    folder = PrivateFolder()
    assert os.stat(folder.path).st_mode & 0o777 == 0o700
    folder.remove()
