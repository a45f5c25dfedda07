"""Connects the parts: starts a server, says where it listens, and drains it."""

from __future__ import annotations

import logging

from lovasz import wire
from lovasz.server.config import ServerConfig
from lovasz.server.device.engine import Engine
from lovasz.server.device.hardware import choose_device, hardware_name
from lovasz.server.device.load import DeviceWatch
from lovasz.server.housekeeping import INTERVAL_SECONDS, Housekeeper
from lovasz.server.memory.allocator import MemoryReturner
from lovasz.server.memory.pool import KEPT_SECONDS, StagingPool
from lovasz.server.observe.metrics import Metrics
from lovasz.server.observe.waiting_steps import WaitingSteps
from lovasz.server.schedule.admission import Admission
from lovasz.server.schedule.batcher import Batcher
from lovasz.server.schedule.joint.table import JointTable
from lovasz.server.transport.call import Pipeline
from lovasz.server.transport.grpc_server import GrpcServer
from lovasz.server.transport.health import HealthMonitor
from lovasz.server.transport.sending import SendWatch
from lovasz.server.transport.servicer import LossServicer
from lovasz.server.transport.shared_memory import SharedMemory
from lovasz.server.web.http_server import WebServer
from lovasz.server.web.status_page import StatusPage
from lovasz.version import VERSION

_log = logging.getLogger(__name__)

_ENGINE_STOP_SECONDS = 5.0


class Server:
    """A loss server in this process.

    Attributes:
        targets: where it serves gRPC, each HOST:PORT with the bound port, or unix:/path.
        metrics_url: where it serves its metrics.
    """

    def __init__(self, config: ServerConfig) -> None:
        """Builds the parts; nothing listens or computes yet.

        Raises:
            DeviceError: this host does not have the configured device.
        """
        self._config = config
        self._metrics = Metrics(config.max_runs)
        self._admission = Admission(config.memory_budget_bytes, config.max_requests)
        self._batcher = Batcher(config.max_batch_elements, config.max_batch_requests, config.max_batch_delay_seconds)
        self._joints = JointTable(self._admission, self._batcher, self._metrics, config.joint_timeout_seconds)
        self._engine = Engine(
            choose_device(config.device),
            self._batcher,
            self._metrics,
            health_interval_seconds=config.health_interval_seconds,
            stall_seconds=config.device_stall_seconds,
        )
        self._staging = StagingPool(self._engine.device)
        paths = config.socket_paths if config.shared_memory else ()
        self._shared_memory = [SharedMemory(path + wire.MEMORY_SUFFIX) for path in paths]
        self._grpc = GrpcServer(config.max_requests)
        self._health = HealthMonitor(self._engine)
        sending = SendWatch(config.stall_seconds, self._metrics)
        pipeline = Pipeline(
            admission=self._admission,
            staging=self._staging,
            batcher=self._batcher,
            joints=self._joints,
            metrics=self._metrics,
            calls=self._grpc.loss_calls,
        )
        servicer = LossServicer(
            pipeline=pipeline,
            engine=self._engine,
            shared_memory=self._shared_memory,
            readers=self._grpc.readers,
            sending=sending,
            stall_seconds=config.stall_seconds,
        )
        self._grpc.offer(servicer, self._health)
        self._device_watch = DeviceWatch(self._engine.device)
        memory = MemoryReturner(self._take_peak_bytes, periods=round(KEPT_SECONDS / INTERVAL_SECONDS))
        self._housekeepers = (
            Housekeeper("housekeeper", [sending.check, self._joints.check, self._staging.trim, memory.check]),
            Housekeeper("device-watch", [self._device_watch.sample]),  # Alone: it may hang if the device does.
        )
        self._declare_gauges()
        page = StatusPage(self._metrics.registry, self._joints.waiting_steps)
        self._web = WebServer(self._metrics.registry, page)
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
                "lovasz_device_healthy": lambda: self._engine.healthy,
            }
        )
        self._metrics.registry.register(WaitingSteps(joints.waiting_steps, config.max_runs))
        device = self._engine.device
        self._metrics.describe(version=VERSION, device=str(device), hardware=hardware_name(device))

    def start(self) -> None:
        """Binds all addresses, starts the device, and serves.

        Raises:
            OSError: an address cannot be bound.
            DeviceError: the device does not compute.
        """
        config = self._config
        self.targets = tuple(map(self._grpc.bind, config.addresses))
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

    def _take_peak_bytes(self) -> int:
        return self._admission.take_peak_bytes() + self._staging.idle_bytes

    def stop(self) -> bool:
        """Refuses new calls, lets accepted ones finish within the configured time, and ends all threads.

        Returns:
            Whether all accepted calls finished.
        """
        pending = self._admission.requests_in_flight
        _log.info("draining", extra={"requests": pending, "seconds": self._config.drain_seconds})
        self._health.stop()
        self._admission.close()
        # gRPC goes on accepting calls: admission refuses them with a reason on which clients try again.
        left = self._admission.wait_until_empty(self._config.drain_seconds)
        self._joints.stop()
        self._grpc.stop()
        finished = self._engine.stop(_ENGINE_STOP_SECONDS) and left == 0
        self._web.stop()
        for shared_memory in self._shared_memory:
            shared_memory.stop()
        for housekeeper in self._housekeepers:
            housekeeper.stop()
        self._grpc.end_threads(wait=finished)
        _log.info("stopped", extra={"unfinished_requests": left})
        return finished
