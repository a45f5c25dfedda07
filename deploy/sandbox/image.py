"""Builds the images that docker-compose.yml names, on stand-ins for what only a registry has.

- The base ubuntu:24.04 is a small system of the distribution that this runs on, made by debootstrap, or a tar of any
  other system with apt and Python.
- Prometheus is that distribution's package, under the name and tag that docker-compose.yml asks for.

A stand-in has another digest than the image that it stands in for, so digests are left out.
"""

from __future__ import annotations

import ast
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from checking import ok, run

BASE = "docker.io/library/ubuntu:24.04"

# Like the image of Prometheus: its user, its folders, its command, and a BusyBox.
PROMETHEUS_DOCKERFILE = """
FROM ubuntu:24.04
RUN apt-get update \\
 && apt-get install --yes --no-install-recommends busybox \\
 && cd /tmp && apt-get download prometheus && dpkg --extract prometheus_*.deb prometheus && rm prometheus_*.deb \\
 && mv prometheus/usr/bin/prometheus /bin/ && mv prometheus/usr/share/prometheus /usr/share/ && rm -r prometheus \\
 && ln -s "$(command -v busybox)" /usr/local/bin/wget \\
 && mkdir -p /etc/prometheus && install --directory --owner 65534 --group 65534 /prometheus
USER 65534
WORKDIR /prometheus
EXPOSE 9090
VOLUME /prometheus
ENTRYPOINT ["/bin/prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
"""


def without_digest(name: str) -> str:
    """The name and tag of an image."""
    return name.partition("@")[0]


def pip_mounts(folder: Path) -> list[str]:
    """Gives the build's pip the settings of this machine's, such as a local index or a private CA.

    Returns:
        Options of buildah that mount, read-only: a pip.conf, the CA bundle, and the local folders in the settings.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    lines = run([sys.executable, "-m", "pip", "config", "list"], env=environment).splitlines()
    pairs = [line.split("=", 1) for line in lines if "=" in line]
    # The environment wins over files, as in pip.
    pairs.sort(key=lambda pair: pair[0].startswith(":env:"))
    settings = {key.rpartition(".")[2]: str(ast.literal_eval(value)) for key, value in pairs}
    mounts: dict[str, str] = {}
    bundle = settings.get("cert") or os.environ.get("SSL_CERT_FILE") or os.environ.get("REQUESTS_CA_BUNDLE")
    if bundle and Path(bundle).is_file():
        settings["cert"] = "/etc/pip-ca.crt"
        mounts["/etc/pip-ca.crt"] = str(Path(bundle).resolve())
    for word in " ".join(value for key, value in settings.items() if key != "cert").split():
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.exists():
            # The pages of an index link to files beside them.
            path = path.parent if path.name == "simple" else path
            mounts[str(path)] = str(path)
    # In a value of several lines, all but the first are indented.
    written = "".join(f"{key} = {value}\n".replace("\n", "\n  ").rstrip(" ") for key, value in settings.items())
    (folder / "pip.conf").write_text("[global]\n" + written)
    mounts["/etc/pip.conf"] = str(folder / "pip.conf")
    return [f"--volume={source}:{target}:ro" for target, source in mounts.items()]


def make_base(folder: Path, tar: Path | None, env: dict[str, str]) -> None:
    """Imports the base image, from a tar if there is one."""
    release = platform.freedesktop_os_release()
    if tar is None:
        components = "main,universe" if release["ID"] == "ubuntu" else "main"
        tree, tar = folder / "base", folder / "base.tar"
        options = ["--variant=minbase", f"--components={components}", "--include=python3,python3-venv,ca-certificates"]
        run(["debootstrap", *options, release["VERSION_CODENAME"], tree])
        run(["tar", "--create", "--file", tar, "--directory", tree, "."])
        shutil.rmtree(tree)
    run(["podman", "import", tar, BASE], env=env)
    name = run(
        ["podman", "run", "--rm", "--network=none", BASE, "sh", "-c", '. /etc/os-release; echo "$PRETTY_NAME"'], env=env
    )
    ok(f"the base: {name.strip()} stands in for ubuntu:24.04")


def build(folder: Path, services: dict[str, Any], env: dict[str, str]) -> None:
    """Builds both images with their names in docker-compose.yml, the server's as that file says."""

    def bud(name: str, *arguments: object) -> None:
        # Names without a host are Docker Hub's, as for Compose.
        name = f"docker.io/{name if '/' in name else f'library/{name}'}"
        options = ["--isolation=chroot", "--network=host", "--pull-never", "--format=docker", f"--tag={name}"]
        run(["buildah", "bud", *options, *arguments], env=env)
        size = int(run(["podman", "image", "inspect", "--format", "{{.Size}}", name], env=env))
        ok(f"built {name.removeprefix('docker.io/').removeprefix('library/')}: {size / 1e6:,.0f} MB")

    server = services["server-cpu"]
    settings = server["build"].get("args", {}).items()
    arguments = [f"--build-arg={name}={without_digest(value)}" for name, value in settings]
    bud(server["image"], *arguments, *pip_mounts(folder), server["build"]["context"])
    (folder / "prometheus").mkdir()
    (folder / "prometheus" / "Dockerfile").write_text(PROMETHEUS_DOCKERFILE)
    bud(without_digest(services["prometheus"]["image"]), folder / "prometheus")
