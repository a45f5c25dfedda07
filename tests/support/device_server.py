"""A loss server, in a process of its own, whose device is one of a stand-in's: their memory is host memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from support.fork_server import ForkedServer
from support.host_driver import HostDriver

from lovasz.server import __main__, server
from lovasz.server.launch import ServerProcess
from lovasz.server.memory.shared_devices import SharedDevices

_TESTS = str(Path(__file__).parents[1])


def device_server(
    *arguments: str, device: int = 0, count: int = 1, strangers: tuple[tuple[int, int], ...] = ()
) -> ServerProcess:
    """A server that computes on a device of the stand-in.

    Args:
        arguments: as for ``lovasz-server``.
        device: the device.
        count: the devices that there are.
        strangers: pairs (device, owner) that cannot access each other's memory.
    """
    process = ForkedServer(["--device", "cpu", "--shared-memory", *arguments])
    code = f"import sys; sys.path.insert(0, {_TESTS!r}); from support.device_server import main; main()"
    process._command[1:3] = ["-c", code, json.dumps({"device": device, "count": count, "strangers": strangers})]
    return process


def main() -> None:
    """Runs the server: the first argument of the process is the stand-in's, as JSON; the others are the server's."""
    options = json.loads(sys.argv.pop(1))
    driver = HostDriver(options["count"], strangers=frozenset(map(tuple, options["strangers"])))

    def shared_devices(_: torch.device) -> SharedDevices:
        return SharedDevices(driver, options["device"])

    server.shared_devices = shared_devices
    sys.exit(__main__.main())
