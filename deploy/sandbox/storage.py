"""Where buildah and podman keep everything: in one folder, with settings of their own."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path


def environment(folder: Path) -> dict[str, str]:
    """Makes the storage, and returns the environment that makes buildah and podman use it."""
    for name in ("tmp", "networks"):
        (folder / name).mkdir()
    limits = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
    # Podman's default is 1,048,576 of each, which may be more than the machine allows.
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
