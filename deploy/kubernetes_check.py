"""Checks deploy/kubernetes without a cluster: against the schemas of Kubernetes, and by rules of this project.

Run by ``make check``, with the Python of ``.venv-deploy``, which has kubernetes-validate. ``kubectl kustomize`` or
``kustomize`` puts overlays together; where neither is installed, only the files that are whole resources are validated.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from checking import ROOT, CheckFailed, ok, require, run

try:
    import kubernetes_validate
    import yaml
except ModuleNotFoundError as missing:
    print(f"Kubernetes: not checked, as {missing.name} is not installed (PyPI: kubernetes-validate)")
    sys.exit(0)

FOLDER = ROOT / "deploy" / "kubernetes"
OLDEST_VERSION = "1.30"
"""The first with preStop.sleep."""
LAST_SECONDS = 10
"""What a server may take to end when it has drained: answers leave, the device's thread ends, Python exits."""
ALERTS_JOB = "lovasz"
ROOT_ALLOWED = {"socket-folder"}
"""Containers that run as root: they make a folder of the node writable for the server."""

Resource = dict[str, Any]


def kustomize() -> list[str] | None:
    """The command that puts a folder together; None if there is none that knows components."""
    for command, least in ((["kubectl", "kustomize"], (1, 21)), (["kustomize", "build"], (3, 7))):
        try:
            arguments = ["version", "--client"] if command[0] == "kubectl" else ["version"]
            said = subprocess.run([command[0], *arguments], capture_output=True, text=True, timeout=30).stdout
        except (FileNotFoundError, subprocess.TimeoutExpired):
            continue
        found = re.search(r"v(\d+)\.(\d+)\.", said)
        if found and (int(found[1]), int(found[2])) >= least:
            return command
    return None


def resources(text: str) -> list[Resource]:
    return [document for document in yaml.safe_load_all(text) if document]


def validate(where: str, found: list[Resource]) -> set[str]:
    """Validates resources against the schemas of the oldest and the newest version.

    Returns:
        The kinds that have no schema, as they are not Kubernetes' own.
    """
    without = set()
    for resource in found:
        for version in (OLDEST_VERSION, kubernetes_validate.latest_version()):
            try:
                kubernetes_validate.validate(resource, version, strict=True)
            except kubernetes_validate.SchemaNotFoundError:
                without.add(resource["kind"])
            except kubernetes_validate.ValidationError as error:
                raise CheckFailed(f"{where}: {resource['kind']}: {error.message} at {list(error.path)}") from None
    return without


def workload(where: str, found: list[Resource]) -> Resource:
    """The one resource that has pods."""
    have_pods = [one for one in found if one["kind"] in ("Deployment", "DaemonSet")]
    if len(have_pods) != 1:
        raise CheckFailed(f"{where}: expected one Deployment or DaemonSet, got {len(have_pods)}")
    return have_pods[0]


def problems(found: list[Resource], pods: Resource) -> Iterator[str]:
    """What breaks a rule of this project."""
    template = pods["spec"]["template"]
    pod, labels = template["spec"], template["metadata"]["labels"]
    server = pod["containers"][0]
    environment = {variable["name"]: variable.get("value") for variable in server["env"]}
    if pod.get("automountServiceAccountToken") is not False or pod.get("enableServiceLinks") is not False:
        yield "the pod has a token of the cluster, or variables named after services"
    if pod["securityContext"].get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "the pod has no seccomp profile"
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        yield from confinement_problems(container, pod["securityContext"])
    wait = server["lifecycle"]["preStop"]["sleep"]["seconds"] + float(environment["LOVASZ_DRAIN_SECONDS"])
    if pod["terminationGracePeriodSeconds"] < wait + LAST_SECONDS:
        yield f"the grace period is shorter than preStop, drain and {LAST_SECONDS} s: {wait + LAST_SECONDS} s"
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        port = server[probe].get("grpc", {}).get("port")
        if ("exec" in server[probe]) == (port is not None) or port not in (None, ports.get("grpc")):
            yield f"{probe}: expected gRPC's port, or a command"
    has_tls = "LOVASZ_TLS_CERT" in environment
    if has_tls and "grpc" in server["readinessProbe"]:
        yield "the kubelet's gRPC probes speak no TLS"
    if unknown := unknown_variables(set(environment), has_tls):
        yield f"the server does not know {', '.join(sorted(unknown))}"
    for one in found:
        selector = one["spec"].get("podSelector") or one["spec"].get("selector") or {}
        selected = selector.get("matchLabels", selector)
        if not selected.items() <= labels.items():
            yield f"{one['kind']}: selects {selected}, pods have {labels}"
        for port in one["spec"].get("ports", []) if one["kind"] == "Service" else []:
            if port["targetPort"] not in ports:
                yield f"the service's port {port['name']} is none of the pods'"
        if one["kind"] == "ServiceMonitor":
            services = [other for other in found if other["kind"] == "Service"]
            names = {port["name"] for service in services for port in service["spec"]["ports"]}
            if [service["metadata"]["name"] for service in services] != [ALERTS_JOB]:
                yield f"the job would not be named {ALERTS_JOB}, as the alerts expect"
            if not {endpoint["port"] for endpoint in one["spec"]["endpoints"]} <= names:
                yield "the service monitor asks a port that the service does not have"


def confinement_problems(container: Resource, of_pod: Resource) -> Iterator[str]:
    name, context = container["name"], of_pod | container["securityContext"]
    if not re.search(r":(?!latest)[\w.-]+$|@sha256:[0-9a-f]{64}$", container["image"]):
        yield f"{name}: the image {container['image']} has no version"
    if not (context.get("runAsNonRoot") and context.get("runAsUser")) and name not in ROOT_ALLOWED:
        yield f"{name}: runs as root"
    if context.get("allowPrivilegeEscalation") is not False or not context.get("readOnlyRootFilesystem"):
        yield f"{name}: may gain privileges, or write to its root file system"
    if context.get("capabilities", {}).get("drop") != ["ALL"]:
        yield f"{name}: keeps capabilities"
    if "memory" not in container["resources"]["limits"] or "cpu" not in container["resources"]["requests"]:
        yield f"{name}: no limit of memory, or no request for processors"


def unknown_variables(names: set[str], has_tls: bool) -> set[str]:
    """Variables that docs/configuration.md, which is made from the server's options, does not have."""
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    unknown = {name for name in names if name.startswith("LOVASZ_") and f"`{name}`" not in page}
    if has_tls and "`LOVASZ_TLS_CERT`" not in page:  # Manifests may be newer than the server.
        print("Kubernetes: the variables of TLS and tokens were not compared with the server's options")
        unknown = {name for name in unknown if not name.startswith(("LOVASZ_TLS_", "LOVASZ_TOKENS"))}
    return unknown


def check_overlays(command: list[str]) -> None:
    without = set()
    overlays = sorted(path.parent for path in FOLDER.glob("overlays/*/kustomization.yaml"))
    for overlay in overlays:
        where = f"overlay {overlay.name}"
        found = resources(run([*command, overlay]))
        without |= validate(where, found)
        if broken := list(problems(found, workload(where, found))):
            raise CheckFailed(f"{where}: {'; '.join(broken)}")
        ok(f"{where}: {', '.join(sorted(one['kind'] for one in found))}")
    require(overlays, f"valid in Kubernetes {OLDEST_VERSION} and {kubernetes_validate.latest_version()}; confined")
    print(f"Kubernetes: no schemas here for {', '.join(sorted(without))}, which come with the Prometheus Operator")


def check_files() -> None:
    whole = sorted(path for path in FOLDER.rglob("*.yaml") if path.name != "kustomization.yaml")
    for path in whole:
        validate(str(path.relative_to(ROOT)), resources(path.read_text(encoding="utf-8")))
    require(whole, f"{len(whole)} files are valid in Kubernetes {OLDEST_VERSION}, as far as it has schemas for them")
    print("Kubernetes: overlays not checked, as neither kubectl 1.21 nor kustomize 3.7, or newer, is installed")


def main() -> None:
    try:
        command = kustomize()
        if command is None:
            check_files()
        else:
            check_overlays(command)
    except CheckFailed as failure:
        sys.exit(f"not ok: {failure}")


if __name__ == "__main__":
    main()
