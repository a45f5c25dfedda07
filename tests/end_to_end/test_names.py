"""A name belongs to one server: host names with several addresses, and the files of Unix sockets."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.fork_server import ForkedServer
from support.messages import tensors
from support.waiting import eventually

from lovasz.client import LossClient, LovaszSoftmax
from lovasz.server.launch import ServerProcess

SOFTMAX = LovaszSoftmax()
LOOPBACK = ("127.0.0.1", "::1")


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this host has no ::1")


@contextmanager
def taken_at(host: str) -> Iterator[int]:
    """A port that something listens on at one address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        yield listener.getsockname()[1]


def start_of(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A start that fails."""
    command = [sys.executable, "-m", "lovasz.server", "--device", "cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def answers(target: str) -> bool:
    with LossClient(target) as client:
        return client.compute(*tensors(8), SOFTMAX).loss > 0


# --- Host names ---------------------------------------------------------------------------------------------------


@needs_ipv6
@pytest.mark.parametrize("host", LOOPBACK)
@pytest.mark.parametrize("flag", ["--listen", "--metrics-listen"])
def test_a_name_is_not_bound_if_one_of_its_addresses_is_taken(flag: str, host: str) -> None:
    with taken_at(host) as port:
        listen = {"--listen": "127.0.0.1:0", "--metrics-listen": "127.0.0.1:0", flag: f"localhost:{port}"}
        ended = start_of(*(word for pair in listen.items() for word in pair))
    shown = f"[{host}]" if ":" in host else host
    assert ended.returncode == 2
    assert f"{flag} localhost:{port}: {shown}:{port}: Address already in use" in ended.stderr
    assert "Traceback" not in ended.stderr


@needs_ipv6
def test_a_wildcard_is_not_bound_if_one_of_its_addresses_is_taken() -> None:
    with taken_at("::1") as port:
        ended = start_of("--listen", f"[::]:{port}", "--metrics-listen", "127.0.0.1:0")
    assert ended.returncode == 2
    assert f"--listen [::]:{port}: [::]:{port}: Address already in use" in ended.stderr


@needs_ipv6
def test_a_name_is_bound_at_all_its_addresses() -> None:
    with ServerProcess(["--device", "cpu", "--listen", "localhost:0", "--metrics-listen", "localhost:0"]) as server:
        host, _, port = server.target.rpartition(":")
        assert (host, int(port) > 0) == ("localhost", True)
        assert answers(server.target)
        assert all(answers(f"{address}:{port}") for address in ("127.0.0.1", "[::1]"))
        for address in ("localhost", "127.0.0.1", "[::1]"):
            with urllib.request.urlopen(server.metrics_url.replace("localhost", address)) as page:
                assert page.status == 200


def test_an_unknown_name_is_told() -> None:
    ended = start_of("--listen", "no-such-host.invalid:50051", "--metrics-listen", "127.0.0.1:0")
    assert ended.returncode == 2
    assert "--listen no-such-host.invalid:50051: " in ended.stderr
    assert "Traceback" not in ended.stderr


# --- Socket files -------------------------------------------------------------------------------------------------


def unix_server(path: Path, *more: str) -> ServerProcess:
    return ForkedServer(["--device", "cpu", "--listen", f"unix:{path}", *more])


def events(server: ServerProcess) -> list[object]:
    return [line["event"] for line in server.log]


def test_a_socket_file_that_was_removed_is_made_again(tmp_path: Path) -> None:
    paths = [tmp_path / "s", tmp_path / "s.memory"]
    with unix_server(paths[0], "--shared-memory") as server, LossClient(server.target) as before:
        first = before.compute(*tensors(8), SOFTMAX).loss
        for path in paths:
            path.unlink()
        assert eventually(lambda: all(path.exists() for path in paths))
        assert eventually(lambda: events(server).count("a socket's file was removed; created it again") == 2)
        for transport in ("grpc", "shm"):
            with LossClient(server.target, transport=transport) as client:
                assert client.compute(*tensors(256), SOFTMAX).loss > 0
        assert before.compute(*tensors(8), SOFTMAX).loss == first, "its connection goes on"
        assert server.stop() == 0
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_stops_leaves_the_socket_of_its_successor(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with unix_server(path) as first:
        os.kill(first.pid, signal.SIGSTOP)  # So that it does not make its file again before the second starts.
        path.unlink()
        with unix_server(path) as second:
            stopping = threading.Thread(target=first.stop)
            stopping.start()
            os.kill(first.pid, signal.SIGCONT)
            stopping.join()
            assert first.log[-1]["event"] == "stopped"
            assert path.exists()
            assert answers(second.target)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_nobody_can_reach_any_more_ends(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with unix_server(path) as server, socket.socket(socket.AF_UNIX) as successor:
        successor.bind(str(tmp_path / "t"))
        successor.listen()
        os.rename(tmp_path / "t", path)
        assert eventually(lambda: "stopped" in events(server))
        assert "another file took the place of a socket" in events(server)
        assert "no caller can reach this server any more: stopping" in events(server)
        assert eventually(lambda: Path(f"/proc/{server.pid}/stat").read_text().split()[2] == "Z"), "ended by itself"
        assert server.stop() == 0
        assert path.exists()


def test_a_server_with_another_address_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with unix_server(path, "--listen", f"unix:{path},127.0.0.1:0") as server:
        (tmp_path / "t").write_text("in its place")
        (tmp_path / "t").rename(path)
        assert eventually(lambda: "another file took the place of a socket" in events(server))
        assert answers(server.targets[1])
        assert server.stop() == 0
        assert path.read_text() == "in its place"


def test_only_a_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("no socket")
    ended = start_of("--listen", f"unix:{path}", "--metrics-listen", "127.0.0.1:0")
    assert ended.returncode == 2
    assert f"--listen unix:{path}: a file that is not a socket is there" in ended.stderr
    assert path.read_text() == "no socket"


def test_a_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    ended = start_of("--listen", f"unix:{tmp_path}/none/s", "--metrics-listen", "127.0.0.1:0")
    assert ended.returncode == 2
    assert f"--listen unix:{tmp_path}/none/s: got the folder {tmp_path}/none, which is not there" in ended.stderr
