"""The HTTP server on its own: formats that cannot be read, failures, and no file descriptors."""

from __future__ import annotations

import http.client
import os
import socket
import time
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge

from lovasz.server.web import http_server
from lovasz.server.web.guard import Guard
from lovasz.server.web.http_server import WebServer
from lovasz.server.web.status_page import StatusPage


def failing() -> float:
    raise ValueError("a reader failed")


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("things", "Things.", registry=registry).inc()
    return registry


@pytest.fixture
def port(registry: CollectorRegistry) -> Iterator[int]:
    page = StatusPage(registry, list, lambda: False)
    server = WebServer(page, page, Guard(["localhost"], None), None)
    yield server.start("127.0.0.1", 0)
    server.stop()


def answer(port: int, accept: str = "") -> tuple[int, str, str]:
    """Status, type and text of the metrics."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/metrics", headers={"Accept": accept})
        response = connection.getresponse()
        return response.status, response.headers["Content-Type"], response.read().decode()
    finally:
        connection.close()


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text;version=x",
        "application/openmetrics-text;version=",
        "text/plain;version=;;=",
        "*/*",
    ],
)
def test_formats_that_cannot_be_read_are_answered_with_text(port: int, accept: str) -> None:
    status, kind, text = answer(port, accept)
    assert status == 200
    assert kind.startswith(("text/plain", "application/openmetrics-text"))
    assert "things_total 1.0" in text


def test_failures_of_one_moment_are_one_line_of_the_log(
    port: int, registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    Gauge("broken", "Broken.", registry=registry).set_function(failing)
    for _ in range(5):
        status, _, text = answer(port)
        assert (status, text) == (500, "the server's log says why\n")
    records = [record for record in caplog.records if record.levelname != "DEBUG"]
    assert 1 <= len(records) <= 2, "one a second"
    assert records[0].getMessage() == "an HTTP call could not be answered"
    assert vars(records[0])["reason"] == "ValueError: a reader failed"
    assert records[0].exc_info is None


def test_without_file_descriptors_it_waits_and_goes_on(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that cannot be taken would be tried again at once, all the time."""
    monkeypatch.setattr(http_server, "_PAUSE_SECONDS", 0.01)
    tries = []
    accept = socket.socket.accept

    def refused(listener: socket.socket) -> tuple[socket.socket, object]:
        tries.append(time.monotonic())
        if len(tries) <= 3:
            raise OSError(24, os.strerror(24))
        return accept(listener)

    monkeypatch.setattr(socket.socket, "accept", refused)
    assert answer(port)[0] == 200
    assert len(tries) == 4
    assert tries[3] - tries[0] >= 0.03, "it did not wait"
