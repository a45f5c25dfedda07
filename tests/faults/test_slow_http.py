"""Connections to the metrics port that send a byte now and then, or take nothing."""

from __future__ import annotations

import contextlib
import socket
import time
import urllib.request
from urllib.parse import urlparse

from support.audit import Audit
from support.waiting import eventually, has_ended

from lovasz.server.launch import ServerProcess
from lovasz.server.web import http_server


def test_slow_connections_do_not_take_the_metrics_away_and_end(besieged: ServerProcess, audit: Audit) -> None:
    address = urlparse(besieged.metrics_url)
    with contextlib.ExitStack() as connections:
        slow = []
        for number in range(2 * http_server._MOST_CONNECTIONS):
            slow.append(connections.enter_context(socket.create_connection((address.hostname, address.port), 30)))
            if number % 64 == 63:
                time.sleep(1.0)  # A flood of connections that come at once is refused as it is.
        for connection in slow:
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
        for _ in range(5):
            time.sleep(0.6)
            for connection in slow:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(b"x")
            with urllib.request.urlopen(besieged.metrics_url, timeout=10) as page:
                assert b"lovasz_device_healthy 1.0" in page.read()
        assert eventually(lambda: all(map(has_ended, slow)))
