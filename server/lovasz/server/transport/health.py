"""The health service (``grpc.health.v1``): SERVING while the device answers and the server is not stopping."""

from __future__ import annotations

import logging
import threading

from grpc_health.v1 import health, health_pb2

from lovasz.server.device.engine import Engine
from lovasz.server.transport.servicer import SERVICE_NAME

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
SERVICE_NAMES = ("", SERVICE_NAME)


class HealthMonitor:
    """Keeps the status of the health service up to date."""

    def __init__(self, engine: Engine) -> None:
        self.servicer = health.HealthServicer()
        self._engine = engine
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="health", daemon=True)
        self._serving: bool | None = None
        self.look()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """The status is NOT_SERVING from now on."""
        self._stopping.set()
        self._thread.join()
        self.servicer.enter_graceful_shutdown()

    def _watch(self) -> None:
        while not self._stopping.wait(_LOOK_SECONDS):
            self.look()

    def look(self) -> None:
        """Takes over what the device's state is now."""
        serving = self._engine.healthy
        if serving == self._serving:
            return
        status = health_pb2.HealthCheckResponse
        for name in SERVICE_NAMES:
            self.servicer.set(name, status.SERVING if serving else status.NOT_SERVING)
        if self._serving is not None:
            _log.log(logging.INFO if serving else logging.ERROR, "health", extra={"serving": serving})
        self._serving = serving
