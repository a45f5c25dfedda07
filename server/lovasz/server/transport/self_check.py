"""Asks this server's own health over gRPC: a process whose gRPC is dead must not live on."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lovasz.server.transport.private_folder import PrivateFolder
from lovasz.wire import MAX_SOCKET_PATH_BYTES, UNIX

_log = logging.getLogger(__name__)

_ANSWER_SECONDS = 10.0
_MOST_FAILURES = 3
"""Failures in a row after which gRPC counts as dead: half a minute without an answer."""
_DEAD = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class SelfCheck:
    """Calls health on sockets that only this user can reach. Any answer of the server will do.

    Attributes:
        paths: of the sockets, in a folder of their own: one for each of gRPC's servers, which has to listen on it.
    """

    def __init__(self, servers: int, fail: Callable[[str], object]) -> None:
        """Makes the folder.

        Args:
            servers: how many servers of gRPC there are.
            fail: called with the reason once gRPC is dead.

        Raises:
            OSError: the folder cannot be made, or its path is too long for a socket.
        """
        self._folder = PrivateFolder()
        self.paths = [os.path.join(self._folder.path, str(number)) for number in range(servers)]
        if len(os.fsencode(self.paths[-1])) > MAX_SOCKET_PATH_BYTES:
            self._folder.remove()
            raise OSError(f"{self._folder.path}: the path is too long for a socket; set TMPDIR to a shorter one")
        self._fail = fail
        self._failures = dict.fromkeys(self.paths, 0)
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
        self._channels = {path: grpc.insecure_channel(f"{UNIX}{path}", options=options) for path in self.paths}

    def check(self) -> None:
        """A chore; may take as long as an answer may."""
        for path, channel in self._channels.items():
            self._check(path, health_pb2_grpc.HealthStub(channel))

    def _check(self, path: str, stub: health_pb2_grpc.HealthStub) -> None:
        try:
            stub.Check(health_pb2.HealthCheckRequest(), timeout=_ANSWER_SECONDS)
        except grpc.RpcError as error:
            if not os.path.exists(path):
                # Something cleaned up the folder of temporary files. Callers have other sockets.
                if not self._failures[path]:
                    _log.warning("a socket was removed: gRPC is not checked there any more", extra={"path": path})
                self._failures[path] = 1
                return
            if error.code() in _DEAD:
                self._failures[path] += 1
                _log.error("gRPC does not answer", extra={"times": self._failures[path], "reason": error.code().name})
                if self._failures[path] >= _MOST_FAILURES:
                    self._fail("gRPC does not answer")
                return
        except ValueError:
            return  # The server stops.
        self._failures[path] = 0

    def stop(self) -> None:
        """Ends the connections, and removes the folder."""
        for channel in self._channels.values():
            channel.close()
        self._folder.remove()
