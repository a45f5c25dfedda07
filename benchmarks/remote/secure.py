"""What TLS, tokens and spans cost a call: servers with and without them take turns.

python -m benchmarks.remote.secure    # two minutes on two cores; needs openssl

Each line has the fastest and the median call, and the processor time of client and server for each call.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.remote.race import Timed, race
from lovasz.client import TLS, LossClient, LovaszSoftmax
from lovasz.server.launch import ServerProcess

SHAPES = {"1x3x8x8": 40, "1x19x512x1024": 3}
"""Shapes of logits, with the calls in a block of each."""
TURNS = 6
TOKEN = "a-token-of-this-benchmark"
NAMES = 200
"""Names in the tokens file."""
NOBODY = "http://127.0.0.1:9"
"""A collector that does not answer: spans are made, and dropped."""
_CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc", "-days", "1")


def make_files(folder: Path) -> None:
    """A CA, a certificate of server and client, and tokens."""

    def certificate(name: str, *options: str) -> None:
        files = ("-keyout", f"{name}.key", "-out", f"{name}.pem")
        command = ["openssl", "req", "-x509", *_CURVE, "-subj", f"/CN={name}", *files, *options]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)

    certificate("ca")
    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "basicConstraints=critical,CA:FALSE")
    certificate("server", *signed, "-addext", "subjectAltName=IP:127.0.0.1")
    certificate("client", *signed)
    others = (f"caller{number}:{TOKEN}-{number}\n" for number in range(NAMES - 1))
    (folder / "tokens").write_text(f"caller:{TOKEN}\n" + "".join(others))


def contenders(folder: Path) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """The options of each server, and those of its client."""
    ca, server, client = folder / "ca.pem", folder / "server", folder / "client"
    tls = ["--tls-cert", f"{server}.pem", "--tls-key", f"{server}.key"]
    tokens = ["--tokens", str(folder / "tokens")]
    mutual = TLS(ca, f"{client}.pem", f"{client}.key")
    found: dict[str, tuple[list[str], dict[str, Any]]] = {
        "plain": ([], {}),
        "tokens": (tokens, {"token": TOKEN}),
        "TLS": (tls, {"tls": TLS(ca)}),
        "mutual TLS and tokens": ([*tls, "--tls-client-ca", str(ca), *tokens], {"tls": mutual, "token": TOKEN}),
    }
    if find_spec("opentelemetry") is not None:
        found["spans"] = (["--otlp-endpoint", NOBODY], {})
    return found


class Clock:
    """Processor time of this process and of a server, in seconds."""

    def __init__(self, server: ServerProcess) -> None:
        self._stat = Path(f"/proc/{server.pid}/stat")

    def __call__(self) -> float:
        user, system = self._stat.read_text().rpartition(")")[2].split()[11:13]
        return time.process_time() + (int(user) + int(system)) / 100


@contextmanager
def opened(options: Sequence[str], access: dict[str, Any]) -> Iterator[tuple[ServerProcess, LossClient]]:
    with ServerProcess(["--device", "cpu", *options]) as server, LossClient(server.target, **access) as client:
        yield server, client


def contender(client: LossClient, clock: Clock, tensors: tuple[Any, Any], kind: str, spent: dict[str, float]) -> Timed:
    """Its calls add the processor time that they take to ``spent``."""

    def call() -> None:
        before = clock()
        client.compute(*tensors, LovaszSoftmax())
        spent[kind] += clock() - before

    return Timed(call)


def main() -> None:
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        make_files(Path(name))
        running = {kind: stack.enter_context(opened(*made)) for kind, made in contenders(Path(name)).items()}
        for text, calls in SHAPES.items():
            shape = tuple(map(int, text.split("x")))
            logits = random.standard_normal(shape).astype(np.float32)
            labels = random.integers(0, shape[1], (shape[0], *shape[2:]), np.uint8)
            spent = dict.fromkeys(running, 0.0)
            timed = {
                kind: contender(client, Clock(server), (logits, labels), kind, spent)
                for kind, (server, client) in running.items()
            }
            race(timed, TURNS, calls, lambda text: None)
            print(f"{text}, loss and gradient")
            for kind, one in timed.items():
                fastest, processor = 1e3 * min(one.seconds), 1e3 * spent[kind] / (TURNS * (calls + 1))
                print(f"  {kind:22} {fastest:8.2f} {one.median_ms:8.2f} ms, processor {processor:6.1f} ms")


if __name__ == "__main__":
    main()
