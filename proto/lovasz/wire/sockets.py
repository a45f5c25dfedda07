"""What both sides agree on about Unix sockets: how addresses name them, and the one that memory is shared on."""

from __future__ import annotations

import os
import socket
import struct

UNIX = "unix:"
"""The prefix of a Unix socket's address."""
MAX_SOCKET_PATH_BYTES = 107
"""The longest path of a Unix socket on Linux."""
CAN_SHARE_MEMORY = hasattr(os, "memfd_create")
"""Whether this system has what memory is shared with; Linux has."""
MEMORY_SUFFIX = ".memory"
"""The socket on which memory is shared has the path of gRPC's Unix socket and this suffix."""
MAX_PACKET_BYTES = 64 << 10
"""The longest packet on that socket."""
MAX_REGIONS = 64
"""The most regions of one connection there."""


def socket_path(address: str) -> str | None:
    """The path of a Unix socket's address; None for any other address."""
    return address.removeprefix(UNIX).removeprefix("//") if address.startswith(UNIX) else None


def lacks_slash(address: str) -> bool:
    """Whether a relative path follows ``unix://``: gRPC takes its first part for a host."""
    return address.startswith(f"{UNIX}//") and not address.startswith(f"{UNIX}///")


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """The process id and the user id at the other end of a Unix socket: of who connected, or of who listens."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    process, user, _ = struct.unpack("3i", credentials)
    return process, user
