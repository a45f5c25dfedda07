"""Connects the parts: starts a server, says where it listens, and drains it."""

from __future__ import annotations

import logging
import threading
import time

from lovasz import wire
from lovasz.server import addresses
from lovasz.server.access.certificates import certificate_files
from lovasz.server.access.exposure import warn_if_open
from lovasz.server.access.limits import UNLIMITED, Limits
from lovasz.server.access.tokens import Tokens, token_file
from lovasz.server.config import ServerConfig
from lovasz.server.device.engine import Engine
from lovasz.server.device.guard import DeviceGuard
from lovasz.server.device.hardware import choose_device, hardware_name
from lovasz.server.device.load import DeviceWatch
from lovasz.server.errors import DeviceError
from lovasz.server.housekeeping import INTERVAL_SECONDS, Chore, Housekeeper
from lovasz.server.memory.allocator import MemoryReturner
from lovasz.server.memory.pool import KEPT_SECONDS, StagingPool
from lovasz.server.memory.shared_devices import shared_devices
from lovasz.server.observe.metrics import Metrics
from lovasz.server.observe.optional_spans import spans_to
from lovasz.server.observe.waiting_steps import WaitingSteps
from lovasz.server.schedule.admission import Admission
from lovasz.server.schedule.batcher import TURN_ELEMENTS, Batcher
from lovasz.server.schedule.job import TOKEN, Tenant
from lovasz.server.schedule.joint.table import JointTable
from lovasz.server.transport.call import SERVICE_NAME, Pipeline
from lovasz.server.transport.gate import Gate
from lovasz.server.transport.grpc_server import LAST_BYTES_SECONDS, GrpcServer
from lovasz.server.transport.health import HEALTH_SERVICE_NAME, HealthMonitor
from lovasz.server.transport.lanes import Lanes
from lovasz.server.transport.receiving import Patience
from lovasz.server.transport.reflection import Reflection
from lovasz.server.transport.self_check import SelfCheck
from lovasz.server.transport.sending import SendWatch
from lovasz.server.transport.servicer import LossServicer
from lovasz.server.transport.shared_memory import SharedMemory
from lovasz.server.transport.socket_calls import SocketThreads
from lovasz.server.transport.timed_calls import TimedCalls
from lovasz.server.web.guard import Guard
from lovasz.server.web.http_server import WebServer
from lovasz.server.web.shortened import page_for_strangers
from lovasz.server.web.status_page import StatusPage
from lovasz.version import VERSION

_log = logging.getLogger(__name__)

_ENGINE_STOP_SECONDS = 5.0
_LOOK_SECONDS = 0.1
"""How often a server that starts looks whether it is to stop."""


class Server:
    """A loss server in this process.

    Attributes:
        targets: where it serves gRPC, each HOST:PORT with the bound port, or unix:/path.
        metrics_url: where it serves its metrics.
        failure: why it can serve no more, and stops; empty: it can.
    """

    def __init__(self, config: ServerConfig, stopping: threading.Event) -> None:
        """Builds the parts; nothing listens or computes yet.

        Args:
            stopping: set when the server is to stop; the server sets it itself once no caller can reach it.

        Raises:
            ConfigError: a file of certificates or tokens cannot be used, or spans are wanted without the extra otel.
            DeviceError: this host does not have the configured device.
        """
        self._config = config
        self._stopping = stopping
        self._start_error: Exception | None = None
        self.failure = ""
        self._self_check: SelfCheck | None = None
        self._metrics = Metrics(config.max_runs)
        self._certificates = certificate_files(config)
        self._tokens = token_file("--tokens", config.tokens_file)
        metrics_tokens = token_file("--metrics-tokens", config.metrics_tokens_file)
        self._spans = spans_to(config.otlp_endpoint)
        self._admission = Admission(
            config.memory_budget_bytes, config.max_requests, lambda name: self._limits_of(name).budget
        )
        self._admission.starting = True
        device = choose_device(config.device)
        self._batcher = Batcher(
            config.max_batch_elements,
            config.max_batch_requests,
            config.max_batch_delay_seconds,
            TURN_ELEMENTS[device.type],
            self._weight_of,
        )
        self._joints = JointTable(
            self._admission,
            self._batcher,
            self._metrics,
            config.joint_timeout_seconds,
            config.max_segments,
            config.joint_share,
            config.joint_regroup_seconds,
        )
        self._engine = Engine(
            device,
            self._batcher,
            self._metrics,
            health_interval_seconds=config.health_interval_seconds,
            stall_seconds=config.device_stall_seconds,
        )
        self._staging = StagingPool(self._engine.device)
        self._shared_memory = self._new_shared_memory()
        gate = None if self._tokens is None else Gate(self._tokens, self._metrics)
        self._lanes = Lanes()
        self._grpc = GrpcServer(
            config.max_requests, config.max_connection_age_seconds, self._certificates, gate, self._lanes
        )
        self._health = HealthMonitor(self._engine, self._metrics)
        checks = self._offer_services()
        self._device_watch = DeviceWatch(self._engine.device)
        self._housekeepers = self._new_housekeepers(checks, metrics_tokens)
        self._declare_gauges()
        self._web = self._new_web_server(metrics_tokens)
        self.targets = config.addresses
        self.metrics_url = ""

    def _new_shared_memory(self) -> list[SharedMemory]:
        """A socket of shared memory beside each Unix socket of gRPC, if wanted."""
        config = self._config
        paths = config.socket_paths if config.shared_memory else ()
        devices = shared_devices(self._engine.device) if paths else None
        return [
            SharedMemory(
                path + wire.MEMORY_SUFFIX, config.memory_budget_bytes, config.max_shared_bytes // len(paths), devices
            )
            for path in paths
        ]

    def _offer_services(self) -> list[Chore]:
        """Connects the services to what carries their calls; returns the checks that they need every second."""
        config = self._config
        headerless = TimedCalls(
            "calls without a header",
            config.header_seconds,
            self._grpc.max_headerless,
            self._metrics,
            option="--header-timeout",
        )
        self._sending = SendWatch(config.stall_seconds, self._metrics)
        pipeline = Pipeline(
            admission=self._admission,
            staging=self._staging,
            batcher=self._batcher,
            compute_now=self._engine.compute_now,
            is_quick=self._engine.is_quick,
            has_large_job=self._engine.has_large_job,
            joints=self._joints,
            metrics=self._metrics,
            calls=self._grpc.loss_calls,
            max_segments=config.max_segments,
            lanes=self._lanes,
            spans=self._spans,
        )
        servicer = LossServicer(
            pipeline=pipeline,
            engine=self._engine,
            shared_memory=self._shared_memory,
            readers=self._grpc.readers,
            sending=self._sending,
            patience=Patience(
                header_seconds=config.header_seconds,
                stall_seconds=config.stall_seconds,
                payload_seconds=config.payload_seconds,
            ),
            headerless=headerless,
        )
        reflection = Reflection((SERVICE_NAME, HEALTH_SERVICE_NAME), self._metrics) if config.reflection else None
        self._grpc.offer(servicer, self._health, reflection, self._metrics)
        self._socket_threads: SocketThreads | None = None
        if self._shared_memory:
            self._socket_threads = SocketThreads(
                config.max_requests, servicer.compute_shared, self._lanes, self._metrics
            )
            for shared_memory in self._shared_memory:
                shared_memory.offer(self._socket_threads)
        timed = [headerless, self._health.headerless, *([reflection.streams] if reflection else [])]
        return [*(calls.check for calls in timed), self._sending.check]

    def _new_housekeepers(self, checks: list[Chore], metrics_tokens: Tokens | None) -> list[Housekeeper]:
        memory = MemoryReturner(self._take_peak_bytes, periods=round(KEPT_SECONDS / INTERVAL_SECONDS))
        device_guard = DeviceGuard(self._engine, self._admission, self._config.device_stall_seconds, self._fail)
        self._access_files = [files for files in (self._certificates, self._tokens, metrics_tokens) if files]
        return [
            Housekeeper(
                "housekeeper",
                [
                    *checks,
                    self._lanes.check,
                    self._joints.check,
                    device_guard.check,
                    self._staging.trim,
                    memory.check,
                    self._check_socket_files,
                ],
            ),
            Housekeeper("device-watch", [self._device_watch.sample]),  # Alone: it may hang if the device does.
            # As it may if a file's disk does.
            Housekeeper("access-files", [*(files.check for files in self._access_files), self._forget_callers]),
        ]

    def _new_web_server(self, metrics_tokens: Tokens | None) -> WebServer:
        config = self._config
        shown = self._metrics.registry, self._joints.waiting_steps, lambda: self._engine.starting
        hosts = addresses.split(config.metrics_listen)[0], *config.metrics_host_names
        guard = Guard(hosts, metrics_tokens, self._tokens)
        certificates = self._certificates if config.metrics_tls else None
        return WebServer(StatusPage(*shown), page_for_strangers(*shown), guard, certificates)

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
                "lovasz_shared_device_memory_bytes": lambda: sum(
                    shared.device_nbytes for shared in self._shared_memory
                ),
                "lovasz_joint_groups_waiting": lambda: joints.groups,
                "lovasz_joint_ranks_waiting": lambda: joints.waiting_ranks,
                "lovasz_joint_answers_kept": lambda: joints.kept,
                "lovasz_device_memory_used_bytes": lambda: self._device_watch.used_bytes,
                "lovasz_device_memory_bytes": lambda: self._device_watch.memory_bytes,
                "lovasz_access_files_valid": lambda: all(files.is_valid for files in self._access_files),
                "lovasz_device_utilization_ratio": lambda: self._device_watch.utilization,
                "lovasz_starting": lambda: self._engine.starting,
                "lovasz_device_healthy": lambda: self._engine.healthy,
            }
        )
        self._metrics.registry.register(WaitingSteps(joints.waiting_steps, config.max_runs))
        device = self._engine.device
        self._about = {"device": str(device), "hardware": hardware_name(device), "version": VERSION}
        self._metrics.describe(**self._about)

    def start(self) -> bool:
        """Binds all addresses, answers health and refuses losses while the device starts, then serves.

        Returns:
            False if the server was told to stop before it was ready: threads of the device are still at work then.

        Raises:
            OSError: an address cannot be bound, or the system refuses a thread.
            DeviceError: the device does not compute.
        """
        starter = threading.Thread(target=self._start_engine, name="starter", daemon=True)
        try:
            self._bind()
            warn_if_open(self._config)
            self._device_watch.check_budget(self._config.memory_budget_bytes)
            self._start_threads(starter)
        except OSError:
            self.abandon()
            raise
        while starter.is_alive() and not self._stopping.is_set():
            starter.join(_LOOK_SECONDS)
        if starter.is_alive():
            return False
        if self._start_error is not None:
            self.abandon()
            raise self._start_error
        if self._self_check is not None:
            self._self_check.check()  # Its connections, too, are there from the start.
        self._admission.starting = False
        self._health.look()
        where = {"listen": ",".join(self.targets), "metrics": self.metrics_url}
        _log.info("ready", extra={**where, **self._about})
        return True

    def _start_threads(self, starter: threading.Thread) -> None:
        """Starts all threads, so that none is refused later."""
        try:
            if self._socket_threads is not None:
                self._socket_threads.start_all()
            self._grpc.start()
            self._health.start()
            for housekeeper in self._housekeepers:
                housekeeper.start()
            starter.start()
        except RuntimeError as error:
            raise OSError(f"{error}: is there a limit of processes, threads or address space?") from error

    def _listen_to_itself(self) -> None:
        try:
            self._self_check = SelfCheck(self._grpc.servers, self._fail)
            self._grpc.listen_privately(self._self_check.paths)
        except OSError as error:
            _log.warning("the server cannot watch its own gRPC", extra={"reason": str(error)})
            return
        self._housekeepers.append(Housekeeper("self-check", [self._self_check.check]))

    def _fail(self, reason: str) -> None:
        if not self._stopping.is_set():
            self.failure = reason
            _log.error("the server cannot go on: stopping", extra={"reason": reason})
            self._stopping.set()

    def _bind(self) -> None:
        config = self._config
        self.targets = tuple(map(self._grpc.bind, config.addresses))
        for shared_memory in self._shared_memory:
            try:
                shared_memory.start()
            except OSError as error:
                raise OSError(f"--shared-memory: {shared_memory.path}: {error.strerror or error}") from error
        host, web_port = addresses.split(config.metrics_listen)
        try:
            web_port = self._web.start(host, web_port)
        except OSError as error:
            raise OSError(f"--metrics-listen {config.metrics_listen}: {error.strerror or error}") from error
        self._listen_to_itself()
        scheme = "https" if config.metrics_tls else "http"
        self.metrics_url = f"{scheme}://{addresses.joined(host, web_port)}/metrics"

    def _limits_of(self, name: str) -> Limits:
        return UNLIMITED if self._tokens is None else self._tokens.limits_of(name)

    def _weight_of(self, tenant: Tenant) -> float:
        return self._limits_of(tenant.name).weight if tenant.kind == TOKEN else 1.0

    def _forget_callers(self) -> None:
        if self._tokens is not None:
            self._metrics.keep_callers(self._tokens.names)

    def _start_engine(self) -> None:
        try:
            self._device_watch.sample()
            self._engine.start()
        except Exception as error:
            self._start_error = error if isinstance(error, DeviceError) else DeviceError(str(error))

    def _check_socket_files(self) -> None:
        if not self._grpc.check_socket_files() and not self._stopping.is_set():
            _log.error("no caller can reach this server any more: stopping")
            self._stopping.set()

    def abandon(self) -> None:
        """Ends what listens, without waiting for anything."""
        if self._self_check is not None:
            self._self_check.stop()
        self._grpc.stop()
        for shared_memory in self._shared_memory:
            shared_memory.stop()
        self._web.stop()
        self._grpc.end_threads(wait=False)

    def _take_peak_bytes(self) -> int:
        return self._admission.take_peak_bytes() + self._staging.idle_bytes

    def stop(self) -> bool:
        """Refuses new calls, lets accepted ones finish within the configured time, and ends all threads.

        Returns:
            Whether all accepted calls finished, and their answers reached the hosts of their callers.
        """
        pending = self._admission.requests_in_flight
        until = time.monotonic() + self._config.drain_seconds
        _log.info("draining", extra={"requests": pending, "seconds": self._config.drain_seconds})
        self._health.stop()
        self._admission.close()
        # gRPC goes on accepting calls: admission refuses them with a reason on which clients try again.
        left = self._admission.wait_until_empty(self._config.drain_seconds)
        self._joints.linger(until)
        self._joints.stop()
        until = max(until, time.monotonic() + LAST_BYTES_SECONDS)
        left = max(left, self._sending.wait_until_sent(until - time.monotonic()))
        if self._self_check is not None:
            self._self_check.stop()
        left = max(left, self._grpc.stop(until))
        finished = self._engine.stop(_ENGINE_STOP_SECONDS) and left == 0
        self._web.stop()
        for shared_memory in self._shared_memory:
            shared_memory.stop()
        for housekeeper in self._housekeepers:
            housekeeper.stop()
        self._grpc.end_threads(wait=finished)
        if self._socket_threads is not None:
            self._socket_threads.stop(wait=finished)
        if self._spans is not None:
            self._spans.stop()
        _log.info("stopped", extra={"unfinished_requests": left})
        return finished
