"""Podman as the engine that Compose talks to."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from checking import run, wait_for


class Podman:
    """A service that Compose reaches at ``socket``, while the ``with`` block lasts.

    Args:
        folder: for the socket and the log.
        env: the environment of podman's commands.
    """

    command: Sequence[str] = ("podman",)

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.env = env
        self._log = folder / "podman.log"
        self.socket = f"unix://{folder}/podman.sock"
        self._done = threading.Event()
        self._checks = threading.Thread(target=self._check_health, daemon=True)

    def __enter__(self) -> Podman:
        with self._log.open("w") as log:
            command = ["podman", "system", "service", "--time=0", self.socket]
            self._service = subprocess.Popen(command, env=self.env, stdout=log, stderr=log)
        path = Path(self.socket.removeprefix("unix://"))
        wait_for(lambda: path.exists() or self._service.poll() is not None, "podman's socket", 30)
        self._checks.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._checks.join()
        self("rm", "--all", "--force", "--time=0", check=False)
        self._service.terminate()
        self._service.wait()

    def __call__(self, *arguments: str, check: bool = True) -> str:
        return run([*self.command, *arguments], env=self.env, check=check).strip()

    def names(self, *listing: str) -> set[str]:
        return set(self(*listing).split())

    def _check_health(self) -> None:
        """Runs health checks every second: podman leaves that to systemd, which there is none of here."""
        while not self._done.wait(1.0):
            for container in self("ps", "--quiet", check=False).split():
                self("healthcheck", "run", container, check=False)
