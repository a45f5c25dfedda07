"""The gRPC servers: their ports, threads, and the services that they offer beside the loss service."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from lovasz import wire
from lovasz.server import addresses
from lovasz.server.access.certificates import Certificates
from lovasz.server.access.watched_files import WatchedFiles
from lovasz.server.observe.metrics import Metrics
from lovasz.server.transport.call_limit import CallLimit
from lovasz.server.transport.credentials import server_credentials
from lovasz.server.transport.gate import Gate
from lovasz.server.transport.health import HealthMonitor
from lovasz.server.transport.lanes import Lanes
from lovasz.server.transport.reflection import Reflection
from lovasz.server.transport.servicer import LossServicer
from lovasz.server.transport.socket_file import Place, SocketFile
from lovasz.server.transport.tcp_queues import wait_until_received
from lovasz.server.transport.threads import CallThreads, LimitedHandler, OwnThreads, start_all
from lovasz.wire import UNIX, socket_path

_log = logging.getLogger(__name__)

_SPARE_CALLS = 64
"""Calls beyond --max-requests, each with a thread. Any call beyond these is refused at once."""
_OTHER_CALLS = 16
"""The spare calls that are reserved for server info, however busy the loss service is."""
_CONNECTION_SHARE = 0.8
"""The share of all calls that one connection may have."""
_LEAST_STREAMS = 128
"""The least limit of gRPC's own for the calls of one connection (streams of HTTP/2). There, gRPC resets calls that come
before it has freed earlier ones, and their callers learn nothing. So it is above the limits of this server, which tells
callers when to try again: it is all calls, and once more as many as requests."""

LAST_BYTES_SECONDS = 1.0
"""How long the answers of finished calls may take to leave at least, once nothing else is in flight."""
_READ_SECONDS = 5.0
"""How long callers may take to read what has reached their hosts. gRPC asks each of them to confirm it (a ping of
HTTP/2). If a connection were closed before, a peer that writes to it first would see an error; many, Envoy and gRPC
among them, then do not read what is there."""
_STOP_SECONDS = 5.0
"""How long gRPC itself may take to stop after that: it never does if one of its threads has died."""

_OPTIONS = (
    ("grpc.http2.max_frame_size", wire.MAX_FRAME_BYTES),
    # Without this, a second server would share a port that is taken, instead of failing.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    # Pings from clients are accepted, also between calls, and the server sends its own.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # By default a connection may take two minutes for TLS and HTTP/2's first frames.
    ("grpc.server_handshake_timeout_ms", 10_000),
    *wire.KEEPALIVE_OPTIONS,
)


class GrpcServer:
    """Listens on ports and Unix sockets, and gives each call a thread.

    The ports and the sockets have a gRPC server each: TLS and tokens are for ports alone.

    Attributes:
        readers: threads that read the streams of calls.
        loss_calls: how many the loss service may have at a time, so that threads are left for health.
    """

    def __init__(
        self,
        max_requests: int,
        max_connection_age_seconds: float,
        certificates: WatchedFiles[Certificates] | None,
        gate: Gate | None,
        lanes: Lanes,
    ) -> None:
        """Listens nowhere yet.

        Args:
            max_requests: the most requests in flight.
            max_connection_age_seconds: a connection takes no new calls after about this time, and those that it has go
                on; 0: it does as long as it lives.
            certificates: for TLS; None: plain text.
            gate: lets calls in on ports; None: all may come in.
            lanes: which calls go on.
        """
        self._credentials = None if certificates is None else server_credentials(certificates)
        self._gate = gate
        self._max_calls = max_requests + _SPARE_CALLS
        self._options: list[tuple[str, int]] = [
            *_OPTIONS,
            ("grpc.max_concurrent_streams", max(self._max_calls + max_requests, _LEAST_STREAMS)),
        ]
        if max_connection_age_seconds:
            self._options.append(("grpc.max_connection_age_ms", round(max_connection_age_seconds * 1000)))
        self._calls = CallThreads(self._max_calls, lanes, int(_CONNECTION_SHARE * self._max_calls))
        self.readers = ThreadPoolExecutor(self._max_calls, thread_name_prefix="reader")
        self.loss_calls = CallLimit(self._max_calls - _OTHER_CALLS)
        self._lock = threading.Lock()
        self._stopped = False
        self._servers: list[grpc.Server] = []
        self._socket_files: list[SocketFile] = []
        self._unmade: set[str] = set()
        self._ports: set[int] = set()

    @property
    def max_headerless(self) -> int:
        """Calls that may wait for their header at a time: half of all, so that others always find a thread."""
        return self._max_calls // 2

    def offer(
        self, servicer: LossServicer, health: HealthMonitor, reflection: Reflection | None, metrics: Metrics
    ) -> None:
        """Takes the services; comes before the other methods."""
        loss = LimitedHandler(servicer.handler(), self._calls, metrics)
        guarded: list[grpc.GenericRpcHandler] = [loss]
        self._services: list[OwnThreads] = [health]
        if reflection is not None:
            guarded.append(reflection.handler())
            self._services.append(reflection)
        checked = guarded
        if self._gate is not None:
            checked = list(map(self._gate.around, guarded))
            self._services.append(self._gate)
        self._port_server = self._new_server([*checked, health.handler()])
        self._socket_handlers = [*guarded, health.handler()]
        self._socket_server = self._new_server(self._socket_handlers)
        self._servers = [self._port_server, self._socket_server]

    def bind(self, address: str) -> str:
        """Listens on HOST:PORT, at all addresses of the host, or on ``unix:/path``.

        Returns:
            The address, with the port that was bound.

        Raises:
            OSError: the address cannot be bound.
        """
        try:
            path = socket_path(address)
            if path is not None:
                self._socket_files.append(
                    SocketFile(path, lambda short: _add_port(self._socket_server, f"{UNIX}{short}"))
                )
                return address
            host, port = addresses.split(address)
            found, port = addresses.free_addresses(host, port)
            for one in found:
                port = _add_port(self._port_server, addresses.joined(one, port), self._credentials)
        except OSError as error:
            raise OSError(f"--listen {address}: {error.strerror or error}") from error
        self._ports.add(port)
        return f"{address.rpartition(':')[0]}:{port}"

    def listen_privately(self, paths: Sequence[str]) -> None:
        """Each of gRPC's servers listens on a Unix socket that has a folder of its own, for this process alone.

        Raises:
            OSError: a socket cannot be bound.
        """
        for server, path in zip(self._servers, paths, strict=True):
            _add_port(server, f"{UNIX}{path}")

    @property
    def servers(self) -> int:
        """How many servers of gRPC there are."""
        return len(self._servers)

    def start(self) -> None:
        """Accepts calls from now on, with all threads that they may need.

        Raises:
            RuntimeError: the system refuses a thread.
        """
        start_all(self.readers, self._max_calls)
        self._calls.start_all()
        for service in self._services:
            service.start_threads()
        for server in self._servers:
            server.start()

    def check_socket_files(self) -> bool:
        """Makes a socket's file again that was removed; False if callers can reach this server nowhere any more.

        gRPC cannot listen on a further address once it has started, so the socket gets a gRPC server of its own.
        Connections over the old one go on.
        """
        with self._lock:
            if self._stopped:
                return True
            for place, file in enumerate(self._socket_files):
                found = file.look()
                if found is Place.EMPTY:
                    self._make_again(place, file)
                elif found is Place.ANOTHER:
                    _log.error("another file took the place of a socket", extra={"path": file.path})
                    file.remove()
                    del self._socket_files[place]
                    break
            return bool(self._ports or self._socket_files)

    def _make_again(self, place: int, file: SocketFile) -> None:
        made: list[grpc.Server] = []

        def bind(short: str) -> None:
            server = self._new_server(self._socket_handlers)
            _add_port(server, f"{UNIX}{short}")
            made.append(server)

        try:
            self._socket_files[place] = SocketFile(file.path, bind)
        except OSError as error:
            if file.path not in self._unmade:
                self._unmade.add(file.path)
                reason = error.strerror or str(error)
                _log.error(
                    "a socket's file was removed and cannot be created again",
                    extra={"path": file.path, "reason": reason},
                )
            return
        file.remove()
        self._unmade.discard(file.path)
        for server in made:
            server.start()
        self._servers += made
        _log.warning("a socket's file was removed; created it again", extra={"path": file.path})

    def stop(self, until: float | None = None) -> int:
        """Accepts no more calls, and ends those that are still here after some seconds.

        Args:
            until: how long the answers of finished calls may take to reach their callers' hosts (``time.monotonic``);
                None: no call was accepted.

        Returns:
            To how many connections they have not in time.
        """
        unsent = 0 if until is None else wait_until_received(self._ports, until)
        with self._lock:
            self._stopped = True
        for file in self._socket_files:
            file.remove()
        grace = LAST_BYTES_SECONDS if unsent or until is None else _READ_SECONDS
        for ended in [server.stop(grace) for server in self._servers]:
            if not ended.wait(grace + _STOP_SECONDS):
                _log.error("gRPC does not stop")
        return unsent

    def end_threads(self, *, wait: bool) -> None:
        """Ends the threads of calls and streams; waits for them unless some may be stuck."""
        self.readers.shutdown(wait=wait, cancel_futures=True)
        self._calls.shutdown(wait=wait, cancel_futures=True)
        for service in self._services:
            service.end_threads(wait=wait)

    def _new_server(self, handlers: list[grpc.GenericRpcHandler]) -> grpc.Server:
        threads: Any = self._calls  # gRPC only submits to it.
        return grpc.server(threads, handlers=handlers, options=self._options)


def _add_port(server: grpc.Server, address: str, credentials: grpc.ServerCredentials | None = None) -> int:
    """Lets a gRPC server listen; returns the port.

    Raises:
        OSError: the address cannot be bound.
    """
    try:
        if credentials is not None:
            return server.add_secure_port(address, credentials)
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError("cannot be bound (is another server there?)") from error
