"""What this process has sent over TCP and its peers have not received: lost if the connection is closed too early.

A socket that is closed while its peer still sends, for instance an acknowledgement of HTTP/2, answers with a reset, and
the system then drops what it had not sent yet. gRPC closes its connections as soon as they have no calls.
"""

from __future__ import annotations

import fcntl
import os
import socket
import termios
import time
from collections.abc import Collection
from contextlib import suppress

_DESCRIPTORS = "/proc/self/fd"
_LOOK_SECONDS = 0.01


def wait_until_received(ports: Collection[int], until: float) -> int:
    """Waits until the hosts of all peers have received everything; returns how many connections still hold something.

    Args:
        ports: those at which the connections came in.
        until: when to give up (``time.monotonic``).
    """
    connections = [int(name) for name in _names()]
    while True:
        connections = [number for number in connections if _holds_bytes(number, ports)]
        if not connections or time.monotonic() >= until:
            return len(connections)
        time.sleep(_LOOK_SECONDS)


def _names() -> list[str]:
    try:
        return os.listdir(_DESCRIPTORS)
    except OSError:  # Not Linux.
        return []


def _holds_bytes(number: int, ports: Collection[int]) -> bool:
    """Whether a file descriptor, which gRPC may close at any time, is such a connection, and has bytes to send."""
    with suppress(OSError):
        connection = socket.socket(fileno=number)
        try:
            if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
                return False
            if connection.getsockname()[1] not in ports:
                return False
            connection.getpeername()
            unsent = fcntl.ioctl(number, termios.TIOCOUTQ, bytes(4))
            return unsent != bytes(4)
        finally:
            connection.detach()
    return False
