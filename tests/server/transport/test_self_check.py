"""The check of this server's own gRPC: it ends a server that is dead, and none that lives."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2_grpc

from lovasz.server.transport.self_check import SelfCheck


@pytest.fixture
def failures() -> list[str]:
    return []


@pytest.fixture
def check(failures: list[str]) -> Iterator[SelfCheck]:
    check = SelfCheck(1, failures.append)
    yield check
    check.stop()


@pytest.fixture
def server(check: SelfCheck) -> Iterator[grpc.Server]:
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
        server.add_insecure_port(f"unix:{check.paths[0]}")
        server.start()
        yield server
        server.stop(None).wait()


def test_a_server_that_answers_is_left_alone(check: SelfCheck, server: grpc.Server, failures: list[str]) -> None:
    for _ in range(4):
        check.check()
    assert failures == []


def test_a_server_that_is_dead_is_ended(check: SelfCheck, failures: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    open(check.paths[0], "x").close()  # A socket's file that nobody listens on.
    for _ in range(3):
        assert failures == []
        check.check()
    assert failures == ["gRPC does not answer"]


def test_a_server_whose_private_socket_was_removed_goes_on(
    check: SelfCheck, server: grpc.Server, failures: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """By what cleans up the folder of temporary files. It shows once the connection is made again."""
    os.unlink(check.paths[0])
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            check.check()
    assert failures == []
    assert [record.getMessage() for record in caplog.records] == [
        "a socket was removed: gRPC is not checked there any more"
    ]


def test_a_folder_whose_path_is_too_long_for_a_socket_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(OSError, match="too long for a socket; set TMPDIR"):
        SelfCheck(1, print)
    assert not os.listdir(folder)
