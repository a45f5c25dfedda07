"""How much memory this process may use, and how much of it is in use: the host's, or that of a cgroup with a limit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lovasz.server.settings import format_bytes

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_PYTORCH_BYTES = 2 << 30
"""What PyTorch takes by itself, generously."""


class _Names(NamedTuple):
    """The files of a memory cgroup, and the key of ``memory.stat`` that counts its inactive file pages."""

    limit: str
    usage: str
    inactive: str


_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Names("memory.max", "memory.current", "inactive_file")


def host_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> tuple[int, int]:
    """The used and the total bytes of the memory that this process may use.

    They are the host's, or those of the cgroup with the lowest limit, if that is below the host's memory. As
    ``docker stats`` does, this counts no inactive file pages of a cgroup. A limit that cannot be read is none.

    Args:
        proc: where the system shows its processes.
        cgroups: where the system shows its cgroups.

    Raises:
        OSError: there is no ``meminfo``: this is not Linux.
        ValueError, LookupError: ``meminfo`` has another format.
    """
    lines = (line.split(":") for line in (proc / "meminfo").read_text().splitlines())
    kibibytes = {name: int(rest.split()[0]) for name, rest in lines}
    total = kibibytes["MemTotal"] << 10
    used = total - (kibibytes["MemAvailable"] << 10)
    for folder, names in _levels(proc, cgroups):
        try:
            limit = int((folder / names.limit).read_text())  # Not "max", which is no limit.
            if limit < total:
                usage = int((folder / names.usage).read_text())
                used, total = max(0, usage - _inactive_bytes(folder, names.inactive)), limit
        except (OSError, ValueError):
            continue
    return used, total


def budget_warning(budget_bytes: int, on_gpu: bool, proc: Path = _PROC, cgroups: Path = _CGROUPS) -> str | None:
    """A sentence for the log if a server with this budget may need more memory than there is.

    Args:
        budget_bytes: ``--memory-budget``.
        on_gpu: whether the computation takes the memory of a GPU; on a CPU, it takes about the budget once more.
        proc: as for ``host_memory``.
        cgroups: as for ``host_memory``.

    Returns:
        None: there is enough, or the memory is unknown.
    """
    try:
        _, total = host_memory(proc, cgroups)
    except (OSError, ValueError, LookupError):
        return None
    needed = budget_bytes * (1 if on_gpu else 2) + _PYTORCH_BYTES
    if needed <= total:
        return None
    others = "PyTorch's own" if on_gpu else "the computation's and PyTorch's own"
    return (
        f"--memory-budget {format_bytes(budget_bytes)} may need {format_bytes(needed)} of memory with {others}, and "
        f"there are {format_bytes(total)} here: the system may end the server under load; lower it, or give more memory"
    )


def _levels(proc: Path, cgroups: Path) -> Iterator[tuple[Path, _Names]]:
    """The memory cgroups of this process, outermost first, each with the names of its files."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:  # "0::/path"
            mount, names = cgroups, _V2
        elif "memory" in controllers.split(","):
            mount, names = cgroups / "memory", _V1
        else:
            continue
        parts = PurePosixPath(path).parts[1:]
        if ".." in parts or not os.path.isdir(mount.joinpath(*parts)):  # Unlike Path.is_dir, it never raises.
            parts = ()  # A path of the host, seen in a container: its own cgroup is the mount's root.
        for depth in range(len(parts) + 1):
            yield mount.joinpath(*parts[:depth]), names


def _inactive_bytes(folder: Path, key: str) -> int:
    """The file pages that the system takes back first; 0 if unknown."""
    try:
        lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return next((int(value) for name, value in lines if name == key), 0)
    except (OSError, ValueError):
        return 0
