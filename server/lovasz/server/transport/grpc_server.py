"""The gRPC server: its ports, its threads, and the services that it offers beside the loss service."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc

from lovasz import wire
from lovasz.server import addresses
from lovasz.server.config import UNIX, socket_path
from lovasz.server.transport.health import HealthMonitor
from lovasz.server.transport.reflection import Reflection
from lovasz.server.transport.servicer import LossServicer
from lovasz.server.transport.socket_file import Place, SocketFile
from lovasz.server.transport.threads import CallThreads, LimitedHandler

_log = logging.getLogger(__name__)

_SPARE_CALLS = 64
"""Calls beyond --max-requests, each with a thread. Any call beyond these is refused at once."""
_OTHER_CALLS = 16
"""The spare calls that are reserved for server info, however busy the loss service is."""
_LEAST_STREAMS = 128
"""Calls that one connection may have open at least. Further calls wait in the client."""

_LAST_BYTES_SECONDS = 1.0
"""How long answers that were handed to gRPC may take to leave the host, once nothing else is in flight."""

_OPTIONS = (
    ("grpc.http2.max_frame_size", wire.MAX_FRAME_BYTES),
    # Without this, a second server would share a port that is taken, instead of failing.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    # Pings from clients are accepted, also between calls, and the server sends its own.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    *wire.KEEPALIVE_OPTIONS,
)


class GrpcServer:
    """Listens on ports and Unix sockets, and gives each call a thread.

    Attributes:
        readers: threads that read the streams of calls.
        loss_calls: one permit for each call that the loss service may have at a time, so that threads are left for
            health.
    """

    def __init__(self, max_requests: int, max_connection_age_seconds: float = 0.0) -> None:
        """Nothing listens yet.

        Args:
            max_requests: the most requests in flight.
            max_connection_age_seconds: a connection takes no new calls after about this time, and those that it has go
                on; 0: it does as long as it lives.
        """
        self._max_calls = max_requests + _SPARE_CALLS
        self._options: list[tuple[str, int]] = [
            *_OPTIONS,
            ("grpc.max_concurrent_streams", max(max_requests, _LEAST_STREAMS)),
        ]
        if max_connection_age_seconds:
            self._options.append(("grpc.max_connection_age_ms", round(max_connection_age_seconds * 1000)))
        self._calls = CallThreads(self._max_calls)
        self.readers = ThreadPoolExecutor(self._max_calls, thread_name_prefix="reader")
        self.loss_calls = threading.BoundedSemaphore(self._max_calls - _OTHER_CALLS)
        self._lock = threading.Lock()
        self._stopped = False
        self._servers: list[grpc.Server] = []
        self._socket_files: list[SocketFile] = []
        self._unmade: set[str] = set()
        self._ports = 0

    @property
    def max_headerless(self) -> int:
        """Calls that may wait for their header at a time: half of all, so that others always find a thread."""
        return self._max_calls // 2

    def offer(self, servicer: LossServicer, health: HealthMonitor, reflection: Reflection | None) -> None:
        """Takes the services; comes before the other methods."""
        loss = LimitedHandler(servicer.handler(), self._calls)
        self._handlers: list[grpc.GenericRpcHandler] = [loss, health.handler()]
        self._services: list[LimitedHandler | HealthMonitor | Reflection] = [loss, health]
        if reflection is not None:
            self._handlers.append(reflection.handler())
            self._services.append(reflection)
        self._servers = [self._new_server()]

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
                self._socket_files.append(SocketFile(path, lambda short: _add_port(self._servers[0], f"{UNIX}{short}")))
                return address
            host, port = addresses.split(address)
            found, port = addresses.free_addresses(host, port)
            for one in found:
                port = _add_port(self._servers[0], addresses.joined(one, port))
        except OSError as error:
            raise OSError(f"--listen {address}: {error.strerror or error}") from error
        self._ports += 1
        return f"{address.rpartition(':')[0]}:{port}"

    def start(self) -> None:
        """Accepts calls from now on."""
        self._servers[0].start()

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
            return self._ports + len(self._socket_files) > 0

    def _make_again(self, place: int, file: SocketFile) -> None:
        made: list[grpc.Server] = []

        def bind(short: str) -> None:
            server = self._new_server()
            _add_port(server, f"{UNIX}{short}")
            made.append(server)

        try:
            self._socket_files[place] = SocketFile(file.path, bind)
        except OSError as error:
            if file.path not in self._unmade:
                self._unmade.add(file.path)
                reason = error.strerror or str(error)
                _log.error(
                    "a socket's file was removed and cannot be made again", extra={"path": file.path, "reason": reason}
                )
            return
        file.remove()
        self._unmade.discard(file.path)
        for server in made:
            server.start()
        self._servers += made
        _log.warning("a socket's file was removed; made it again", extra={"path": file.path})

    def stop(self) -> None:
        """Accepts no more calls, and ends those that are still here after a moment."""
        with self._lock:
            self._stopped = True
        for file in self._socket_files:
            file.remove()
        for ended in [server.stop(_LAST_BYTES_SECONDS) for server in self._servers]:
            ended.wait()

    def end_threads(self, *, wait: bool) -> None:
        """Ends the threads of calls and streams; waits for them unless some may be stuck."""
        self.readers.shutdown(wait=wait, cancel_futures=True)
        self._calls.shutdown(wait=wait, cancel_futures=True)
        for service in self._services:
            service.end_threads(wait=wait)

    def _new_server(self) -> grpc.Server:
        return grpc.server(self._calls, handlers=self._handlers, options=self._options)


def _add_port(server: grpc.Server, address: str) -> int:
    """Lets a gRPC server listen; returns the port.

    Raises:
        OSError: the address cannot be bound.
    """
    try:
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError("cannot be bound (is another server there?)") from error
