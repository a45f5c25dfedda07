"""The gRPC server: its ports, its threads, and the services that it offers beside the loss service."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lovasz import wire
from lovasz.server.config import UNIX
from lovasz.server.transport.health import HealthMonitor
from lovasz.server.transport.servicer import SERVICE_NAME, LossServicer

_SPARE_CALLS = 64
"""Calls of all kinds beyond --max-requests, each with a thread. gRPC itself refuses any call beyond these."""
_OTHER_CALLS = 16
"""The spare calls that are reserved for health, reflection and server info, however busy the loss service is."""

_LAST_BYTES_SECONDS = 1.0
"""How long answers that were handed to gRPC may take to leave the host, once nothing else is in flight."""

_OPTIONS = (
    ("grpc.http2.max_frame_size", wire.MAX_FRAME_BYTES),
    # Without this, a second server would share a port that is taken, instead of failing.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    # Pings find peers that vanished without closing the connection. Pings from clients are accepted.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


class GrpcServer:
    """Listens on ports and Unix sockets, and gives each call a thread.

    Attributes:
        readers: threads that read the streams of calls.
        loss_calls: one permit for each call that the loss service may have at a time, so that threads are left for
            health.
    """

    def __init__(self, max_requests: int) -> None:
        max_calls = max_requests + _SPARE_CALLS
        self._calls = ThreadPoolExecutor(max_calls, thread_name_prefix="call")
        self.readers = ThreadPoolExecutor(max_calls, thread_name_prefix="reader")
        self._grpc = grpc.server(self._calls, options=_OPTIONS, maximum_concurrent_rpcs=max_calls)
        self.loss_calls = threading.BoundedSemaphore(max_calls - _OTHER_CALLS)

    def offer(self, servicer: LossServicer, health: HealthMonitor) -> None:
        """Adds the loss service, health and reflection."""
        self._grpc.add_generic_rpc_handlers((servicer.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(health.servicer, self._grpc)
        names = (
            SERVICE_NAME,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(names, self._grpc)

    def bind(self, address: str) -> str:
        """Listens on HOST:PORT or ``unix:/path``; returns the address with the port that was bound.

        Raises:
            OSError: the address cannot be bound.
        """
        if address.startswith(UNIX) and _answers(address.removeprefix(UNIX)):
            raise OSError(f"--listen {address}: another server is there")  # gRPC would silently replace it.
        try:
            port = self._grpc.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"--listen {address}: cannot be bound (is another server there?)") from error
        return address if address.startswith(UNIX) else f"{address.rpartition(':')[0]}:{port}"

    def start(self) -> None:
        """Accepts calls from now on."""
        self._grpc.start()

    def stop(self) -> None:
        """Accepts no more calls, and ends those that are still here after a moment."""
        self._grpc.stop(_LAST_BYTES_SECONDS).wait()

    def end_threads(self, *, wait: bool) -> None:
        """Ends the threads of calls and streams; waits for them unless some may be stuck."""
        self.readers.shutdown(wait=wait, cancel_futures=True)
        self._calls.shutdown(wait=wait, cancel_futures=True)


def _answers(path: str) -> bool:
    """Whether something listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
        except OSError:
            return False
        return True
