"""Starts a server in a process of its own, and stops it. For demos, notebooks, tests and benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import ClassVar

START_SECONDS = 600.0
"""A first start compiles, for minutes on a slow or busy machine. A server that fails ends, and is not waited for."""
STOP_SECONDS = 60.0


class ServerProcess:
    """A server process: ``with ServerProcess(["--device", "cpu"]) as server: LossClient(server.target)``.

    It listens on free ports of the loopback interface unless the arguments say otherwise.

    Attributes:
        target: where it serves gRPC; the first address if there are several.
        targets: all addresses where it serves gRPC.
        metrics_url: where it serves its metrics.
        pid: its process id.
        log: the lines that it has logged so far, parsed.
    """

    _popen: ClassVar[type[subprocess.Popen[str]]] = subprocess.Popen

    def __init__(self, arguments: Sequence[str] = ()) -> None:
        """Does not start the process yet.

        Args:
            arguments: as for ``lovasz-server``.
        """
        defaults = ("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0")
        self._command = [sys.executable, "-m", "lovasz.server", *defaults, *arguments, "--log-format", "json"]
        self.log: list[dict[str, object]] = []
        self.target = self.metrics_url = ""
        self.targets: tuple[str, ...] = ()
        self.pid = 0

    def __enter__(self) -> ServerProcess:
        """Starts the server, and returns when it is ready.

        Raises:
            RuntimeError: it ended, or was not ready in time; the text has its last log lines.
        """
        self._process = self._popen(
            self._command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
        )
        self.pid = self._process.pid
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, name="server-log", daemon=True)
        self._reader.start()
        try:
            in_time = self._ready.wait(START_SECONDS)
        except BaseException:  # Ctrl-C, for one: nobody else would end the process.
            self.kill()
            raise
        if not self.target:
            self.stop()
            problem = "did not start" if in_time else f"was not ready within {START_SECONDS:g} s"
            said = "\n".join(str(line.get("exception") or line.get("event")) for line in self.log[-20:])
            raise RuntimeError(f"the server {problem}: {' '.join(self._command)}\n{said}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> int:
        """Asks it to stop (SIGTERM) and waits; kills it if that takes too long. Returns its exit status."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        return self._process.returncode

    def kill(self) -> None:
        """Kills it (SIGKILL)."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr:
            for line in self._process.stderr:
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    entry = None
                if not isinstance(entry, dict):
                    entry = {"event": line.rstrip()}
                self.log.append(entry)
                if entry.get("event") == "ready" and "listen" in entry:
                    self.metrics_url = str(entry["metrics"])
                    self.targets = tuple(str(entry["listen"]).split(","))
                    self.target = self.targets[0]
                    self._ready.set()
        self._ready.set()
