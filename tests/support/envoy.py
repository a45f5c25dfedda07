"""Envoy with the configuration of deploy/envoy, in front of servers of a test."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from support.waiting import eventually

ROOT = Path(__file__).parents[2]
CONFIGURATION = ROOT / "deploy" / "envoy"
_OWN = ROOT / ".venv-deploy" / "bin" / "envoy"
ENVOY = str(_OWN) if _OWN.exists() else shutil.which("envoy")
"""The program; None where it is not installed."""


def own_address() -> str:
    """A free port of a loopback address that no connection goes out from: it stays free between two servers."""
    host = ".".join(["127", *(str(random.randint(1, 250)) for _ in range(3))])
    with socket.socket() as found:
        found.bind((host, 0))
        return f"{host}:{found.getsockname()[1]}"


def _socket_address(address: str) -> str:
    host, _, port = address.rpartition(":")
    return f"address: {host}, port_value: {port}"


class Envoy:
    """A process of Envoy, with a certificate that is made for it.

    Attributes:
        target: where it takes calls, with TLS.
        ca: what clients have to trust.
    """

    def __init__(self, servers: Sequence[str], folder: Path) -> None:
        """Writes its files to a folder.

        Args:
            servers: HOST:PORT of each.
        """
        self.target = own_address()
        self.ca = folder / "tls.crt"
        self._log = folder / "envoy.log"
        self._file = folder / "envoy.yaml"
        text = (CONFIGURATION / "envoy.yaml").read_text()
        (endpoint,) = [line for line in text.splitlines() if "address: lovasz," in line]
        changes = {
            endpoint: "\n".join(endpoint.replace(_socket_address("lovasz:50051"), _socket_address(s)) for s in servers),
            _socket_address("0.0.0.0:50443"): _socket_address(self.target),
            _socket_address("127.0.0.1:9901"): _socket_address(own_address()),
            "/etc/envoy": str(folder),
        }
        for was, becomes in changes.items():
            assert was in text, was
            text = text.replace(was, becomes)
        self._file.write_text(text)
        certificate = (CONFIGURATION / "certificate.yaml").read_text()
        (folder / "certificate.yaml").write_text(certificate.replace("/etc/envoy", str(folder)))
        host = self.target.rpartition(":")[0]
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        command += ["-days", "1", "-subj", "/CN=envoy", "-addext", f"subjectAltName=IP:{host}"]
        subprocess.run([*command, "-keyout", folder / "tls.key", "-out", self.ca], check=True, capture_output=True)

    def __enter__(self) -> Envoy:
        assert ENVOY is not None
        command = [ENVOY, "--config-path", self._file, "--concurrency", "1", "--disable-hot-restart"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen([*command, "--log-level", "warning"], stdout=log, stderr=log)
        try:
            assert eventually(self._listens), self._log.read_text()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _listens(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        host, _, port = self.target.rpartition(":")
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return True
        return False

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
