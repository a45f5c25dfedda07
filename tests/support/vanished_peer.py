"""Lets the packets of a client's connections be lost, and tells how long client and server take to notice.

Runs as a program in a network namespace of its own, as root.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from support.messages import tensors

from lovasz.client import LossClient, LovaszSoftmax
from lovasz.server.launch import ServerProcess

ESTABLISHED = "01"
LIMIT_SECONDS = 55.0
SETTLED_SECONDS = 3.0
"""Until nothing is on its way that the kernel would miss by itself."""


def connections(server_port: int) -> set[int]:
    """The clients' ports of the connections that the server has."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text(encoding="ascii").splitlines()[1:]:
            _, local, remote, state, *_ = line.split()
            if state == ESTABLISHED and int(local.rpartition(":")[2], 16) == server_port:
                found.add(int(remote.rpartition(":")[2], 16))
    return found


def drop_all(port: int) -> None:
    for end in ("--sport", "--dport"):
        subprocess.run(["iptables", "-A", "INPUT", "-p", "tcp", end, str(port), "-j", "DROP"], check=True)


def main() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    with ServerProcess(["--device", "cpu"]) as server, LossClient(server.target) as client:
        client.compute(*tensors(8), LovaszSoftmax())
        time.sleep(SETTLED_SECONDS)
        port = int(server.target.rpartition(":")[2])
        lost = connections(port)
        began = time.monotonic()
        for one in lost:
            drop_all(one)
        client.compute(*tensors(8), LovaszSoftmax(), timeout=LIMIT_SECONDS)
        client_seconds = time.monotonic() - began
        while connections(port) & lost and time.monotonic() - began < LIMIT_SECONDS:
            time.sleep(0.1)
        server_seconds = time.monotonic() - began
        after = connections(port)
    print(json.dumps({"lost": len(lost), "client": client_seconds, "server": server_seconds, "after": len(after)}))


if __name__ == "__main__":
    main()
