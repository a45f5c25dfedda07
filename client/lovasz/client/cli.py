"""The command ``lovasz``: its command line, and ``lovasz ping``."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from lovasz.client import access_arguments, number_arguments, token_command
from lovasz.client.client import LossClient
from lovasz.client.errors import DeadlineExceededError, LossError, ServerUnavailableError
from lovasz.client.options import ASKED_OVER_GRPC, IN_DEVICE_MEMORY, IN_SHARED_MEMORY, OVER_GRPC, ClientOptions
from lovasz.client.target import Device, ServerInfo
from lovasz.version import VERSION
from lovasz.wire import socket_path

_AGAIN_SECONDS = 0.2
_WAYS = {
    OVER_GRPC: "over gRPC",
    IN_SHARED_MEMORY: "through shared memory, with header and answer on its socket",
    IN_SHARED_MEMORY + ASKED_OVER_GRPC: "through shared memory, with header and answer over gRPC",
    IN_DEVICE_MEMORY: "through device memory, with header and answer on the shared-memory socket",
    IN_DEVICE_MEMORY + ASKED_OVER_GRPC: "through device memory, with header and answer over gRPC",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 if the server answered, 1 if not; 130 if Ctrl-C ended a load."""
    parser = argparse.ArgumentParser(prog="lovasz", description="Talks to a Lovász loss server.")
    parser.add_argument("--version", action="version", version=f"lovasz {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_CommandParser)
    commands.add_parser(
        "ping",
        help="check that a server answers, and show what it is and how long it takes",
        add_arguments=_add_ping_arguments,
    )
    commands.add_parser(
        "bench",
        help="send requests to a server, and show its throughput and where the time goes",
        add_arguments=_add_bench_arguments,
    )
    commands.add_parser(
        "token", help="make a token for a server with --tokens", add_arguments=token_command.add_arguments
    )
    options = parser.parse_args(arguments)
    try:
        if hasattr(options, "target"):
            options.access = access_arguments.access_of(options, os.environ)
        return int(options.run(options))
    except (LossError, ValueError, OSError) as error:
        print(f"lovasz: {error}", file=sys.stderr)
        return 1


class _CommandParser(argparse.ArgumentParser):
    """Parses one command. Its arguments are added only when that command runs, and with them its modules imported."""

    def __init__(self, *, add_arguments: Callable[[argparse.ArgumentParser], None], **options: Any) -> None:
        super().__init__(**options)
        self._add_arguments = add_arguments

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._add_arguments(self)
        return super().parse_known_args(args, namespace)


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    from lovasz.client.bench import command

    command.add_arguments(parser)
    access_arguments.add_access_arguments(parser)


def _add_ping_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="HOST:PORT or unix:/path")
    parser.add_argument(
        "--count",
        type=number_arguments.whole_number(),
        default=5,
        metavar="N",
        help="how many calls to time (default: 5)",
    )
    parser.add_argument(
        "--timeout", type=float, default=5.0, metavar="SECONDS", help="the timeout of each call (default: 5)"
    )
    parser.add_argument(
        "--wait",
        type=number_arguments.seconds_or_forever,
        default=0.0,
        metavar="SECONDS",
        help="keep trying for this long, until the server has started (default: 0, try once)",
    )
    access_arguments.add_access_arguments(parser)
    parser.set_defaults(run=_ping)


def _ping(options: argparse.Namespace) -> int:
    client_options = ClientOptions(options.timeout, access=options.access)
    with LossClient.with_options(options.target, client_options) as client:
        info = _first_answer(client, time.monotonic() + options.wait)
        seconds = []
        for _ in range(options.count):
            started = time.perf_counter()
            info = client.server_info()
            seconds.append(time.perf_counter() - started)
        way, way_on_gpu = client.transport(), client.transport(on_gpu=True)
    milliseconds = [1000 * s for s in seconds]
    print(f"{options.target} answers: lovasz {info.version}")
    print(
        f"  round trip  median {statistics.median(milliseconds):.2f} ms, fastest {min(milliseconds):.2f} ms, "
        f"slowest {max(milliseconds):.2f} ms ({len(milliseconds)} calls)"
    )
    if socket_path(options.target) is not None:
        print(f"  tensors     {_WAYS[way]}")
    if way_on_gpu != way:
        print(f"  on a GPU    {_WAYS[way_on_gpu]}")
    for device in info.devices:
        print(f"  device      {device.name} ({device.hardware}), {_state(device)}")
    print(f"  losses      {', '.join(info.losses)}")
    print(f"  limits      {info.memory_budget_bytes / 2**30:g} GiB of tensors, {info.max_requests} requests at a time")
    return 0 if all(device.healthy for device in info.devices) else 1


def _first_answer(client: LossClient, until: float) -> ServerInfo:
    """What the server says of itself once it has started, or at the latest when the time is up."""
    while True:
        try:
            info = client.server_info()
            if time.monotonic() >= until or not any(device.starting for device in info.devices):
                return info
        except (ServerUnavailableError, DeadlineExceededError):
            if time.monotonic() >= until:
                raise
        time.sleep(_AGAIN_SECONDS)


def _state(device: Device) -> str:
    if device.starting:
        return "starting: it compiles, a minute or two the first time"
    return "healthy" if device.healthy else "NOT HEALTHY"


if __name__ == "__main__":
    sys.exit(main())
