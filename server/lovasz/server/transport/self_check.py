"""Asks this server's own health over gRPC: a process whose gRPC is dead must not live on."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lovasz.server.config import UNIX

_log = logging.getLogger(__name__)

_ANSWER_SECONDS = 10.0
_MOST_FAILURES = 3
"""Failures in a row after which gRPC counts as dead: half a minute without an answer."""
_DEAD = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class SelfCheck:
    """Calls health on a socket that only this user can reach. Any answer of the server will do.

    Attributes:
        path: the socket's, in a folder of its own; the server has to listen on it.
    """

    def __init__(self, fail: Callable[[str], object]) -> None:
        """Makes the folder.

        Args:
            fail: called with the reason once gRPC is dead.

        Raises:
            OSError: the folder cannot be made.
        """
        self._folder = tempfile.mkdtemp(prefix="lovasz-")
        self.path = os.path.join(self._folder, "s")
        self._fail = fail
        self._failures = 0
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
        self._channel = grpc.insecure_channel(f"{UNIX}{self.path}", options=options)
        self._stub = health_pb2_grpc.HealthStub(self._channel)

    def check(self) -> None:
        """A chore; may take as long as an answer may."""
        try:
            self._stub.Check(health_pb2.HealthCheckRequest(), timeout=_ANSWER_SECONDS)
        except grpc.RpcError as error:
            if error.code() in _DEAD:
                self._failures += 1
                _log.error("gRPC does not answer", extra={"times": self._failures, "reason": error.code().name})
                if self._failures >= _MOST_FAILURES:
                    self._fail("gRPC does not answer")
                return
        except ValueError:
            return  # The server stops.
        self._failures = 0

    def stop(self) -> None:
        """Ends the connection, and removes the folder."""
        self._channel.close()
        shutil.rmtree(self._folder, ignore_errors=True)
