"""Waits until a condition holds, and conditions to wait for."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether the condition holds within half a minute."""
    for _ in range(600):
        if holds():
            return True
        time.sleep(0.05)
    return False


def has_ended(connection: socket.socket) -> bool:
    """Whether the other side has closed a connection on which nothing comes."""
    try:
        return connection.recv(1, socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
