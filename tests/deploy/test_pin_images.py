"""Images are pinned by digests. A command of the test's own stands in for Docker's: no registry is asked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = ("Dockerfile", "docker-compose.yml")
IMAGES = {"nvidia/cuda:13.0.3-runtime-ubuntu24.04", "ubuntu:24.04", "prom/prometheus:v3.5.0", "grafana/grafana:12.1.1"}


def pin(folder: Path, digest: str) -> subprocess.CompletedProcess[str]:
    docker = folder / "bin" / "docker"
    docker.parent.mkdir(exist_ok=True)
    docker.write_text(f'#!/bin/sh\ntest "$1 $2 $3" = "buildx imagetools inspect" && echo {digest}\n')
    docker.chmod(0o755)
    environment = {**os.environ, "PATH": f"{docker.parent}:{os.environ['PATH']}"}
    command = [sys.executable, str(ROOT / "deploy" / "pin_images.py"), "--folder", str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_each_image_that_a_registry_has_gets_its_digest_and_a_newer_one_later(tmp_path: Path) -> None:
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    before = {name: re.sub(r"@sha256:\w+", "", (tmp_path / name).read_text()) for name in FILES}
    for digit in "ab":
        digest = f"sha256:{digit * 64}"
        done = pin(tmp_path, digest)
        assert done.returncode == 0, done.stderr
        assert set(done.stdout.split()) == {f"{image}@{digest}" for image in IMAGES}
        text = "".join((tmp_path / name).read_text() for name in FILES)
        assert text.count(f"@{digest}") == text.count("@sha256:") == len(IMAGES)
        assert {name: (tmp_path / name).read_text().replace(f"@{digest}", "") for name in FILES} == before


def test_nothing_is_written_if_a_digest_is_none(tmp_path: Path) -> None:
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    done = pin(tmp_path, "latest")
    assert done.returncode == 1
    assert "got 'latest'; expected a digest" in done.stderr
    assert all((tmp_path / name).read_text() == (ROOT / name).read_text() for name in FILES)
