"""Namespaces: mounts, processes and a network of their own, of which nothing is left."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from checking import run

CLONE_NEWNET = 0x40000000


def run_in_namespaces(command: Sequence[object]) -> int:
    """Runs a command with mounts and processes of its own, ends all that it leaves, and returns its exit status."""
    # All processes end with the first one of their namespace, and all mounts with the last process. The first one is
    # the shell, which waits for processes that others leave behind.
    namespaces = ["--mount", "--propagation=slave", "--pid", "--fork", "--kill-child", "--mount-proc"]
    words = ["unshare", *namespaces, "sh", "-c", '"$@" & wait $!', "sh", *command]
    process = subprocess.Popen([str(word) for word in words])
    try:
        return process.wait()
    except KeyboardInterrupt:
        return 130
    finally:
        process.kill()
        process.wait()
        _remove_cgroups()


def leave_the_network() -> None:
    """Moves this thread, and all that it starts, to a network that has only a loopback interface."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    run(["ip", "link", "set", "lo", "up"])
    # Podman and the firewall's commands keep locks and lists of networks there, which would be the machine's.
    run(["mount", "-t", "tmpfs", "tmpfs", "/run"])


def _remove_cgroups() -> None:
    """Removes podman's empty groups, which stay if it was killed. A group with processes cannot be removed."""
    deadline = time.monotonic() + 5
    while True:
        parents = [*Path("/sys/fs/cgroup").glob("libpod_parent"), *Path("/sys/fs/cgroup").glob("*/libpod_parent")]
        for parent in parents:
            for group in sorted([parent, *(path for path in parent.rglob("*") if path.is_dir())], reverse=True):
                with contextlib.suppress(OSError):
                    group.rmdir()
        # Killed processes may take a moment to end.
        if not any(parent.exists() for parent in parents) or time.monotonic() > deadline:
            return
        time.sleep(0.2)
