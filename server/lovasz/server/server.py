"""Puts the parts together: starts a server, tells where it listens, and drains it."""

from __future__ import annotations

import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lovasz import wire
from lovasz.server.admission import Admission
from lovasz.server.allocator import MemoryReturner
from lovasz.server.batcher import Batcher
from lovasz.server.config import UNIX, ServerConfig
from lovasz.server.device import DeviceWatch, choose_device, hardware_name
from lovasz.server.engine import Engine
from lovasz.server.health import HealthMonitor
from lovasz.server.housekeeping import INTERVAL_SECONDS, Housekeeper
from lovasz.server.joint import JointTable
from lovasz.server.metrics import Metrics
from lovasz.server.sending import SendWatch
from lovasz.server.service import SERVICE_NAME, LossServicer
from lovasz.server.shared_memory import SharedMemory
from lovasz.server.staging import KEPT_SECONDS, StagingPool
from lovasz.server.waiting_steps import WaitingSteps
from lovasz.server.web import StatusPage, WebServer
from lovasz.version import VERSION

_log = logging.getLogger(__name__)

_SPARE_CALLS = 64
"""Calls of all kinds beyond --max-requests, each with a thread; what comes on top of them, gRPC refuses by itself."""
_OTHER_CALLS = 16
"""Of these, what is left for health, reflection and server info, whatever comes to the loss service."""

_LAST_BYTES_SECONDS = 1.0
"""What answers that were handed to gRPC have to leave the host, once nothing else is in flight."""

_OPTIONS = (
    ("grpc.http2.max_frame_size", wire.MAX_FRAME_BYTES),
    # Without this, a second server would share a port that is taken, instead of failing.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    # Pings find peers that are gone without a word; those of clients are taken.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


class Server:
    """A loss server in this process.

    Attributes:
        targets: where it serves gRPC, each HOST:PORT with the bound port, or unix:/path.
        metrics_url: where it serves its metrics.
    """

    def __init__(self, config: ServerConfig) -> None:
        """
        Raises:
            DeviceError: the configured device is not there.
        """
        self._config = config
        self._metrics = Metrics(config.max_runs)
        self._admission = Admission(config.memory_budget_bytes, config.max_requests)
        self._batcher = Batcher(config.max_batch_elements, config.max_batch_requests, config.max_batch_delay_seconds)
        self._engine = Engine(
            choose_device(config.device), self._batcher, self._metrics, config.health_interval_seconds
        )
        self._health = HealthMonitor(self._engine, config.device_stall_seconds)
        self._calls = ThreadPoolExecutor(config.max_requests + _SPARE_CALLS, thread_name_prefix="call")
        self._grpc = grpc.server(
            self._calls, options=_OPTIONS, maximum_concurrent_rpcs=config.max_requests + _SPARE_CALLS
        )
        self._readers = ThreadPoolExecutor(config.max_requests + _SPARE_CALLS, thread_name_prefix="reader")
        self._staging = StagingPool(self._engine.device)
        paths = config.socket_paths if config.shared_memory else ()
        self._shared_memory = [SharedMemory(path + wire.MEMORY_SUFFIX) for path in paths]
        self._joints = JointTable(self._admission, self._batcher, self._metrics, config.joint_timeout_seconds)
        sending = SendWatch(config.stall_seconds, self._metrics)
        servicer = LossServicer(
            self._admission,
            self._batcher,
            self._joints,
            self._engine,
            self._metrics,
            self._staging,
            self._shared_memory,
            self._readers,
            sending,
            threading.BoundedSemaphore(config.max_requests + _SPARE_CALLS - _OTHER_CALLS),
            config.stall_seconds,
            config.device_stall_seconds,
        )
        self._grpc.add_generic_rpc_handlers((servicer.handler(),))
        self._device_watch = DeviceWatch(self._engine.device)
        memory = MemoryReturner(self._take_peak_bytes, periods=round(KEPT_SECONDS / INTERVAL_SECONDS))
        self._housekeepers = (
            Housekeeper("housekeeper", [sending.check, self._joints.check, self._staging.trim, memory.check]),
            Housekeeper("device-watch", [self._device_watch.sample]),  # Alone: it may hang where the device does.
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, self._grpc)
        names = (
            SERVICE_NAME,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(names, self._grpc)
        self._declare_gauges()
        self._web = WebServer(self._metrics.registry, StatusPage(self._metrics.registry, self._joints))
        self.targets = config.addresses
        self.metrics_url = ""

    def _declare_gauges(self) -> None:
        config, admission, joints = self._config, self._admission, self._joints
        self._metrics.watch(
            {
                "lovasz_queue_requests": lambda: len(self._batcher),
                "lovasz_in_flight_requests": lambda: admission.requests_in_flight,
                "lovasz_max_requests": lambda: config.max_requests,
                "lovasz_in_flight_bytes": lambda: admission.bytes_in_flight,
                "lovasz_budget_bytes": lambda: config.memory_budget_bytes,
                "lovasz_staging_idle_bytes": lambda: self._staging.idle_bytes,
                "lovasz_shared_memory_sessions": lambda: sum(shared.sessions for shared in self._shared_memory),
                "lovasz_shared_memory_bytes": lambda: sum(shared.nbytes for shared in self._shared_memory),
                "lovasz_joint_groups_waiting": lambda: joints.groups,
                "lovasz_joint_ranks_waiting": lambda: joints.waiting_ranks,
                "lovasz_joint_answers_kept": lambda: joints.kept,
                "lovasz_device_memory_used_bytes": lambda: self._device_watch.used_bytes,
                "lovasz_device_memory_bytes": lambda: self._device_watch.memory_bytes,
                "lovasz_device_utilization_ratio": lambda: self._device_watch.utilization,
                "lovasz_device_healthy": lambda: self._engine.healthy(config.device_stall_seconds),
            }
        )
        self._metrics.registry.register(WaitingSteps(joints.waiting_steps, config.max_runs))
        device = self._engine.device
        self._metrics.describe(version=VERSION, device=str(device), hardware=hardware_name(device))

    def start(self) -> None:
        """Binds, brings the device up, and serves.

        Raises:
            OSError: an address cannot be bound.
            DeviceError: the device does not compute.
        """
        config = self._config
        self.targets = tuple(map(self._bind, config.addresses))
        for shared_memory in self._shared_memory:
            try:
                shared_memory.start()
            except OSError as error:
                raise OSError(f"--shared-memory: {shared_memory.path}: {error}") from error
        host, _, web_port = config.metrics_listen.rpartition(":")
        try:
            web_port = str(self._web.start(host.strip("[]"), int(web_port)))
        except OSError as error:
            raise OSError(f"--metrics-listen {config.metrics_listen}: {error}") from error
        self.metrics_url = f"http://{host}:{web_port}/metrics"
        self._engine.start()
        self._health.start()
        self._device_watch.sample()
        for housekeeper in self._housekeepers:
            housekeeper.start()
        self._grpc.start()
        device = self._engine.device
        _log.info(
            "ready",
            extra={
                "listen": ",".join(self.targets),
                "metrics": self.metrics_url,
                "device": str(device),
                "hardware": hardware_name(device),
                "version": VERSION,
            },
        )

    def _bind(self, address: str) -> str:
        """Binds an address of gRPC; returns it with its port."""
        if address.startswith(UNIX) and _answers(address.removeprefix(UNIX)):
            raise OSError(f"--listen {address}: another server is there")  # gRPC would take its place unasked.
        try:
            port = self._grpc.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"--listen {address}: cannot be bound (is another server there?)") from error
        return address if address.startswith(UNIX) else f"{address.rpartition(':')[0]}:{port}"

    def _take_peak_bytes(self) -> int:
        return self._admission.take_peak_bytes() + self._staging.idle_bytes

    def stop(self) -> bool:
        """Refuses new calls, lets accepted ones finish for as long as the configuration grants, and ends all threads.

        Returns:
            Whether all accepted calls finished.
        """
        pending = self._admission.requests_in_flight
        _log.info("draining", extra={"requests": pending, "seconds": self._config.drain_seconds})
        self._health.stop()
        self._admission.close()
        # Until the end, new calls are refused by admission, with a reason that clients try again on.
        left = self._admission.wait_until_empty(self._config.drain_seconds)
        self._joints.stop()
        self._grpc.stop(_LAST_BYTES_SECONDS).wait()
        finished = self._engine.stop(timeout_seconds=5.0) and left == 0
        self._web.stop()
        for shared_memory in self._shared_memory:
            shared_memory.stop()
        for housekeeper in self._housekeepers:
            housekeeper.stop()
        self._readers.shutdown(wait=finished, cancel_futures=True)
        self._calls.shutdown(wait=finished, cancel_futures=True)
        _log.info("stopped", extra={"unfinished_requests": left})
        return finished


def _answers(path: str) -> bool:
    """Whether something listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
        except OSError:
            return False
        return True
