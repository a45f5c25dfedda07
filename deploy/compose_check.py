"""Checks a running Compose project, on any engine that has Docker's command line.

    docker compose --profile cpu up --build --detach
    python deploy/compose_check.py

Its containers become healthy and are confined (no root, no capabilities, a read-only root file system, limits); a
client on the published port gets the right answers; Prometheus scrapes the server and has read the alerts. --down then
takes the project down, and checks that the server ends well and that nothing is left but the volumes.

Needs the client (``pip install .``), and the repository, as it reads the test vectors.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

from checking import ROOT, CheckFailed, compose_environment, ok, require, run, wait_for

from lovasz.client.access import Access
from lovasz.client.access_arguments import access_of, add_access_arguments

HEALTHY_SECONDS = 300
SCRAPE_SECONDS = 30


class Project:
    """The containers, networks and volumes of a Compose project.

    Args:
        name: of the project.
        engine: the command of the engine, such as ``docker``.
        compose: the command of Compose, such as ``docker compose``, with its files if they are not the usual ones.
        engine_env, compose_env: the environments of these commands.
    """

    def __init__(
        self,
        name: str,
        engine: Sequence[str],
        compose: Sequence[str],
        engine_env: dict[str, str] | None = None,
        compose_env: dict[str, str] | None = None,
    ) -> None:
        self._label = f"label=com.docker.compose.project={name}"
        self._engine = engine
        self._engine_env = engine_env
        self._compose = [*compose, "--project-name", name, "--profile", "*"]
        self._compose_env = compose_env or compose_environment()

    def containers(self) -> dict[str, dict[str, Any]]:
        """What the engine knows of each container, by the name of its service."""
        names = self.listed("ps", "--all", "--quiet")
        if not names:
            return {}
        found: list[dict[str, Any]] = json.loads(self.engine("inspect", "--type=container", *names))
        return {container["Config"]["Labels"]["com.docker.compose.service"]: container for container in found}

    def server(self) -> str:
        """The service of the server: one for GPUs, or one without."""
        found = self.containers().keys() & {"server", "server-cpu"}
        if len(found) != 1:
            raise CheckFailed(f"the project has {len(found)} servers; expected one")
        return found.pop()

    def listed(self, *listing: str) -> set[str]:
        """The names that a listing of the engine prints for this project."""
        return set(self.engine(*listing, "--filter", self._label).split())

    def volumes(self) -> set[str]:
        return self.listed("volume", "ls", "--quiet")

    def engine(self, *arguments: str) -> str:
        return run([*self._engine, *arguments], env=self._engine_env)

    def compose(self, *arguments: str) -> str:
        return run([*self._compose, *arguments], env=self._compose_env)


def is_healthy(container: dict[str, Any]) -> bool:
    """Whether it runs, and is healthy if it has a health check."""
    state = container["State"]
    checked = container["Config"].get("Healthcheck")
    return bool(state["Running"]) and (not checked or state["Health"]["Status"] == "healthy")


def check_health(project: Project) -> None:
    def healthy() -> bool:
        containers = project.containers()
        return {project.server(), "prometheus"} <= containers.keys() and all(map(is_healthy, containers.values()))

    require(project.containers(), "the project has containers")
    wait_for(healthy, "all containers are healthy", HEALTHY_SECONDS)
    ok(f"healthy: {', '.join(sorted(project.containers()))}")


def check_confinement(project: Project) -> None:
    for service, container in project.containers().items():
        status_text = project.engine("exec", container["Id"], "cat", "/proc/1/status")
        status = dict(line.split(":\t", 1) for line in status_text.splitlines() if ":\t" in line)
        require("0" not in status["Uid"].split(), f"{service} runs as user {status['Uid'].split()[0]}")
        require(int(status["CapEff"], 16) == 0, f"{service} has no capabilities")
        require(status["NoNewPrivs"] == "1", f"{service} cannot gain any")
        mounts = project.engine("exec", container["Id"], "cat", "/proc/1/mountinfo").splitlines()
        root = next(words for words in map(str.split, mounts) if words[4] == "/")
        require("ro" in root[5].split(","), f"{service} has a read-only root file system")
        memory, pids = container["HostConfig"]["Memory"], container["HostConfig"]["PidsLimit"]
        require(
            memory > 0 and (pids or 0) > 0,
            f"{service} may use {memory / 2**30:g} GiB and {pids} processes and threads",
        )


def check_answers(target: str, access: Access) -> None:
    import numpy as np
    from support.vector_cases import load

    from lovasz.client import LossClient
    from lovasz.client.options import ClientOptions

    cases = load()
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = target.rpartition(":")[0]
    with LossClient.with_options(target, ClientOptions(60.0, access=access)) as client:
        for case in cases:
            result = client.compute(case.logits, case.labels, case.loss_spec)
            if abs(result.loss - case.loss) > 1e-6 * abs(case.loss):
                raise CheckFailed(f"the loss of {case.name} is {result.loss}; expected {case.loss}")
            error = np.linalg.norm(np.asarray(result.grad, np.float64) - case.grad)
            if error > 1e-5 * np.linalg.norm(case.grad):
                raise CheckFailed(f"the gradient of {case.name} is off by {error}")
    ok(f"a client of {target} gets the right answers to {len(cases)} acceptance vectors")


def ask_prometheus(prometheus: str, path: str, **parameters: str) -> Any:
    """The data of an answer of Prometheus's HTTP API."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    url = f"{prometheus}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    with opener.open(url, timeout=10) as page:
        return json.loads(page.read())["data"]


def check_scraping(prometheus: str) -> None:
    def scraped() -> bool:
        active = ask_prometheus(prometheus, "targets")["activeTargets"]
        return {target["labels"]["job"]: target["health"] for target in active}.get("lovasz") == "up"

    def counted() -> bool:
        found = ask_prometheus(prometheus, "query", query="sum(lovasz_requests_total)")["result"]
        return bool(found) and float(found[0]["value"][1]) > 0

    wait_for(scraped, "Prometheus scrapes the server", SCRAPE_SECONDS)
    wait_for(counted, "Prometheus has counted requests", SCRAPE_SECONDS)
    ok("Prometheus scrapes the server by its name, and has counted its requests")
    groups = ask_prometheus(prometheus, "rules")["groups"]
    require(sum(len(group["rules"]) for group in groups), "Prometheus has read the alerts")


def check_running(project: Project, target: str, prometheus: str, access: Access) -> None:
    """All checks that leave the project as it is."""
    check_health(project)
    check_confinement(project)
    check_answers(target, access)
    check_scraping(prometheus)


def check_down(project: Project) -> None:
    """Takes the project down. Its volumes stay."""
    server, volumes = project.server(), project.volumes()
    project.compose("stop", server)
    state = project.containers()[server]["State"]
    require(
        not state["Running"] and state["ExitCode"] == 0,
        f"SIGTERM ends the server with exit status {state['ExitCode']}",
    )
    project.compose("down")
    left = project.listed("ps", "--all", "--quiet") | project.listed("network", "ls", "--quiet")
    require(not left, "down leaves no container and no network")
    require(project.volumes() == volumes, f"down keeps the volumes: {', '.join(sorted(volumes))}")


def find_test_vectors() -> None:
    """Makes the tests' reader of the test vectors importable."""
    sys.path.insert(0, str(ROOT / "tests"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--project", default="lovasz", metavar="NAME", help="the Compose project (default: %(default)s)"
    )
    parser.add_argument("--engine", default="docker", metavar="COMMAND", help="such as podman (default: %(default)s)")
    parser.add_argument(
        "--compose", default="docker compose", metavar="COMMAND", help="the command of Compose (default: %(default)s)"
    )
    parser.add_argument(
        "--target", default="127.0.0.1:50051", help="where the server's port is published (default: %(default)s)"
    )
    parser.add_argument(
        "--prometheus", default="http://127.0.0.1:9090", metavar="URL", help="Prometheus (default: %(default)s)"
    )
    parser.add_argument("--down", action="store_true", help="take the project down afterwards, and check that, too")
    add_access_arguments(parser)
    arguments = parser.parse_args()
    find_test_vectors()
    project = Project(arguments.project, shlex.split(arguments.engine), shlex.split(arguments.compose))
    try:
        access = access_of(arguments, os.environ)
        check_running(project, arguments.target, arguments.prometheus, access)
        if arguments.down:
            check_down(project)
    except CheckFailed as failure:
        sys.exit(f"not ok: {failure}")


if __name__ == "__main__":
    main()
