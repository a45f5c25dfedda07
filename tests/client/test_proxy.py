"""HTTP proxies of the environment: used only where it is asked for, and never to a server on this host."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
import torch
from support.messages import tensors

from lovasz.client import DeadlineExceededError, LossClient, LovaszSoftmax, ServerUnavailableError
from lovasz.client.proxy import enabled_option, remark
from lovasz.client.torch import RemoteLoss
from lovasz.server.launch import ServerProcess

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
NOWHERE = "192.0.2.1:50051"
"""An address that nobody has (RFC 5737)."""
UNREACHED = (ServerUnavailableError, DeadlineExceededError)


class Proxy:
    """Notes what it is asked to connect to, and refuses it."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.asked: list[str] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(1000).decode().split("\r\n")[0])
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What no variable names yet."""
    for variable in (*VARIABLES, "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    proxy = Proxy()
    yield proxy
    proxy.close()


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("http_proxy", [False, True])
def test_a_server_on_this_host_is_reached_without_it(
    server: ServerProcess, proxy: Proxy, variable: str, http_proxy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, proxy.url)
    port = server.target.rpartition(":")[2]
    for target in (server.target, f"localhost:{port}", f"dns:///localhost:{port}", f"ipv4:127.0.0.1:{port}"):
        with LossClient(target, http_proxy=http_proxy) as client:
            assert client.compute(*tensors(8), LovaszSoftmax()).loss > 0
    criterion = RemoteLoss(server.target, LovaszSoftmax(), http_proxy=http_proxy)
    assert criterion(*map(torch.from_numpy, tensors(8))).item() > 0
    criterion.close()
    assert proxy.asked == []


@pytest.mark.parametrize("variable", VARIABLES)
def test_it_is_used_if_it_is_asked_for_and_an_error_names_the_variable(
    proxy: Proxy, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, proxy.url)
    text = rf"went through the proxy that the variable {variable} "
    with LossClient(NOWHERE, http_proxy=True, timeout=3) as client, pytest.raises(UNREACHED, match=text):
        client.server_info()
    assert proxy.asked[0] == f"CONNECT {NOWHERE} HTTP/1.1"


def test_it_is_not_used_otherwise_and_an_error_says_so(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", proxy.url)
    text = r"the proxy that the variable http_proxy names was not used"
    with LossClient(NOWHERE, timeout=1) as client, pytest.raises(UNREACHED, match=text):
        client.server_info()
    assert proxy.asked == []


def test_without_a_variable_nothing_is_said_of_it(proxy: Proxy) -> None:
    assert remark(NOWHERE, wanted=True) == remark(NOWHERE, wanted=False) == ""
    with LossClient(NOWHERE, timeout=1) as client, pytest.raises(UNREACHED) as raised:
        client.server_info()
    assert "proxy" not in str(raised.value)


@pytest.mark.parametrize(
    ("target", "on_this_host"),
    [
        ("127.0.0.1:1", True),
        ("127.1.2.3:1", True),
        ("[::1]:1", True),
        ("LOCALHOST:1", True),
        ("trainer.localhost:1", True),
        ("dns:///localhost:1", True),
        ("ipv6:[::1]:1", True),
        ("unix:/run/s", True),
        ("unix-abstract:s", True),
        ("localhost.example:1", False),
        ("10.0.0.1:1", False),
        ("xds:///lovasz", False),
        ("dns://127.0.0.1/trainer.example:1", False),
    ],
)
def test_which_targets_are_on_this_host(target: str, on_this_host: bool) -> None:
    assert enabled_option(target, wanted=True) == ("grpc.enable_http_proxy", int(not on_this_host))
    assert enabled_option(target, wanted=False) == ("grpc.enable_http_proxy", 0)
