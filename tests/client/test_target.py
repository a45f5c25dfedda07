"""What a target is: what can be told apart before a call is made, and what only a call shows."""

from __future__ import annotations

import http.server
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest

import lovasz.client
import lovasz.core
from lovasz.client import IncompatibleServerError, LossClient, LovaszSoftmax
from lovasz.client.target import checked_target
from lovasz.client.torch import RemoteLoss
from lovasz.version import VERSION


@pytest.mark.parametrize(
    "target",
    [
        "inprocess",
        "localhost:50051",
        "127.0.0.1:1",
        "[::1]:50051",
        "[fe80::1%eth0]:50051",
        "dns:trainer.example:50051",
        "dns:///trainer.example:50051",
        "dns://8.8.8.8/trainer.example:50051",
        "ipv4:10.0.0.1:50051,10.0.0.2:50051",
        "ipv6:[::1]:50051,[::2]:50051",
        "unix:relative",
        "unix:/run/lovasz/s",
        "unix:///run/lovasz/s",
        "unix-abstract:lovasz",
        "xds:///lovasz",
        "unix:/" + 106 * "x",
    ],
)
def test_targets_that_grpc_understands(target: str) -> None:
    assert checked_target(target) == target


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("", "got ''; expected HOST:PORT, unix:/path or 'inprocess'"),
        (None, "got None; expected HOST:PORT, unix:/path or 'inprocess'"),
        (
            "http://localhost:50051",
            "got 'http://localhost:50051'; expected .*: without http://, and with the port of gRPC",
        ),
        ("https://localhost", "got 'https://localhost'; expected .*: without https://"),
        ("http://localhost:9095/metrics", "with the port of gRPC .50051 by default., not that of the metrics"),
        ("grpc://localhost:50051", "without grpc://"),
        ("localhost", "got 'localhost', without a port; expected .* .a server's default port is 50051."),
        ("dns:localhost", "got 'dns:localhost', without a port"),
        ("dns:///localhost", "got 'dns:///localhost', without a port"),
        ("ipv4:10.0.0.1:1,10.0.0.2", "got 'ipv4:10.0.0.1:1,10.0.0.2', without a port"),
        ("[::1]", "in brackets|without a port"),
        ("localhost:", "got 'localhost:', without a port"),
        ("localhost:port", "got 'localhost:port', without a port"),
        ("localhost:50051/metrics", "got 'localhost:50051/metrics', without a port"),
        ("localhost:0", "got 'localhost:0'; expected HOST:PORT"),
        ("localhost:65536", "got 'localhost:65536'; expected HOST:PORT"),
        (":50051", "got ':50051'; expected HOST:PORT"),
        ("a b:50051", "got 'a b:50051'; expected HOST:PORT"),
        ("::1:50051", "with an IPv6 address in brackets: .::1.:50051"),
        ("unix://run/s", "got 'unix://run/s'; expected .*: after unix:// the path .* another slash: unix:/run/s"),
        ("unix:", "got 'unix:', a path of 0 bytes; expected 1 to 107"),
        ("unix:/" + 107 * "x", "a path of 108 bytes; expected 1 to 107, the limit of Unix sockets"),
        ("unix:/" + 54 * "ö", "a path of 109 bytes; expected 1 to 107"),
    ],
)
def test_targets_that_name_no_server(target: str, problem: str) -> None:
    with pytest.raises(ValueError, match=rf"^target: .*{problem}"):
        LossClient(target)
    if isinstance(target, str):
        with pytest.raises(ValueError, match=rf"^target: .*{problem}"):
            RemoteLoss(target, LovaszSoftmax())


def test_shared_memory_needs_room_for_its_suffix() -> None:
    LossClient("unix:/" + 99 * "x", transport="shm").close()
    LossClient("unix:/" + 100 * "x").close()
    with pytest.raises(ValueError, match=r"a path of 101 bytes; expected at most 100, as .memory is appended to it"):
        LossClient("unix:/" + 100 * "x", transport="shm")


# --- What answers is no gRPC server -------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def http_server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@contextmanager
def http11_server() -> Iterator[str]:
    """Refuses what is not HTTP/1.1, as proxies do."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(100)
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=refuse)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("server", [http_server, http11_server])
def test_the_port_of_the_metrics_is_told_at_once(server: object) -> None:
    with server() as target, LossClient(target) as client:  # type: ignore[operator]
        for call in (
            client.server_info,
            lambda: client.compute(np.zeros((1, 2, 3), np.float32), np.zeros((1, 3), np.int64), LovaszSoftmax()),
        ):
            began = time.monotonic()
            with pytest.raises(IncompatibleServerError, match=r"does not speak gRPC: is it the metrics port"):
                call()
            assert time.monotonic() - began < 20


# --- Without torch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("from lovasz.client import LossClient; LossClient('inprocess')", "the target 'inprocess' needs torch"),
        ("import lovasz.core", "lovasz.core needs torch"),
        ("from lovasz.client.torch import RemoteLoss", "lovasz.client.torch needs torch"),
    ],
)
def test_without_torch_the_error_says_what_to_install(code: str, said: str) -> None:
    hidden = f"import sys; sys.modules['torch'] = None; {code}"
    ran = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, timeout=60)
    assert ran.stderr.splitlines()[-1] == f"ModuleNotFoundError: {said}: pip install 'lovasz[torch]'"


def test_a_server_without_its_packages_says_what_to_install() -> None:
    hidden = (
        "import sys; sys.modules['prometheus_client'] = None; from lovasz.server.__main__ import main; "
        "sys.exit(main(['--device', 'cpu']))"
    )
    ran = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert "the server needs prometheus_client: pip install 'lovasz[server,cpu]'" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_versions() -> None:
    assert lovasz.client.__version__ == lovasz.core.__version__ == VERSION
