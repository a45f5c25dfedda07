"""The server's configuration: one frozen dataclass, from flags and ``LOVASZ_*`` variables, validated at once."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any

from lovasz import wire
from lovasz.server.access_settings import AccessSettings
from lovasz.server.settings import ConfigError, format_bytes, integer, number, parse_bytes, setting, switch, variable_of
from lovasz.version import VERSION

DEFAULT_LISTEN = "127.0.0.1:50051"
DEFAULT_METRICS_LISTEN = "127.0.0.1:9095"
DEFAULT_DEVICE = "auto"
DEFAULT_MEMORY_BUDGET_BYTES = 4 << 30
DEFAULT_MAX_REQUESTS = 256
DEFAULT_MAX_BATCH_ELEMENTS = 1 << 25
DEFAULT_MAX_BATCH_REQUESTS = 256
DEFAULT_MAX_BATCH_DELAY_SECONDS = 0.002
DEFAULT_DRAIN_SECONDS = 30.0
DEFAULT_HEALTH_INTERVAL_SECONDS = 5.0
DEFAULT_DEVICE_STALL_SECONDS = 60.0
DEFAULT_STALL_SECONDS = 20.0
DEFAULT_HEADER_SECONDS = 5.0
DEFAULT_PAYLOAD_SECONDS = 120.0
DEFAULT_MAX_SEGMENTS = 1 << 22
DEFAULT_REFLECTION = False
DEFAULT_SHARED_MEMORY = False
DEFAULT_MAX_SHARED_BYTES = 16 << 30
DEFAULT_JOINT_TIMEOUT_SECONDS = 45.0
DEFAULT_JOINT_REGROUP_SECONDS = 0.0
DEFAULT_JOINT_SHARE = 0.5
DEFAULT_MAX_RUNS = 20
DEFAULT_MAX_CONNECTION_AGE_SECONDS = 0.0
DEFAULT_OTLP_ENDPOINT = ""
DEFAULT_LOG_LEVEL = "info"
DEFAULT_LOG_FORMAT = "text"

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")

CLIENT_VARIABLES = frozenset(
    f"LOVASZ_{name}"
    for name in ("TOKEN", "TOKEN_FILE", "TLS_CA", "TLS_CLIENT_CERT", "TLS_CLIENT_KEY", "TLS_SERVER_NAME")
)
"""Those that the command ``lovasz`` reads: a health check beside the server may need them."""

_MOST_SECONDS = 1_000_000
"""More than eleven days. gRPC counts milliseconds in 32 bits, and clocks have limits, too."""
_LEAST_BUDGET_BYTES = 64 << 10
"""A smaller budget holds no request that is worth a call."""
_MOST_REQUESTS = 1 << 16
"""Each needs threads."""

_ENDPOINT = re.compile(r"https?://[^/\s]")
_EXPECTED_ENDPOINT = "http://HOST:PORT or https://HOST:PORT"


def _endpoint(text: str) -> str:
    if text and not _ENDPOINT.match(text):
        raise ValueError(f"got {text!r}; expected {_EXPECTED_ENDPOINT}")
    return text


@dataclass(frozen=True)
class ServerConfig(AccessSettings):
    """All settings of a server. Raises ConfigError for an invalid value."""

    listen: str = setting(
        DEFAULT_LISTEN,
        "--listen",
        "ADDRESSES",
        "where to serve gRPC: HOST:PORT (port 0 takes a free one), unix:/path for callers on this host, or several "
        "addresses separated by commas. Open it to a network that others use only with TLS and tokens",
    )
    metrics_listen: str = setting(
        DEFAULT_METRICS_LISTEN,
        "--metrics-listen",
        "HOST:PORT",
        "where to serve HTTP: /metrics for Prometheus, / for people",
    )
    device: str = setting(
        DEFAULT_DEVICE, "--device", "DEVICE", "auto (the first GPU if there is one, else the CPU), cpu, cuda or cuda:N"
    )
    memory_budget_bytes: int = setting(
        DEFAULT_MEMORY_BUDGET_BYTES,
        "--memory-budget",
        "SIZE",
        "the most tensor bytes of all requests in flight (logits, labels and gradient); further requests are refused, "
        "with a delay after which to try again. The computation needs additional memory",
        parse_bytes,
    )
    max_requests: int = setting(DEFAULT_MAX_REQUESTS, "--max-requests", "N", "the most requests in flight", integer)
    max_batch_elements: int = setting(
        DEFAULT_MAX_BATCH_ELEMENTS,
        "--max-batch-elements",
        "N",
        "the most logits in one batch; a larger request is a batch of its own",
        integer,
    )
    max_batch_requests: int = setting(
        DEFAULT_MAX_BATCH_REQUESTS, "--max-batch-requests", "N", "the most requests in one batch", integer
    )
    max_batch_delay_seconds: float = setting(
        DEFAULT_MAX_BATCH_DELAY_SECONDS,
        "--max-batch-delay",
        "SECONDS",
        "how long a batch stays open for more requests while a GPU computes the one before; an idle device starts "
        "at once",
        number,
    )
    max_segments: int = setting(
        DEFAULT_MAX_SEGMENTS,
        "--max-segments",
        "N",
        "the most segments in one request: classes x groups (images with per_image, else 1), over its Lovász terms; "
        "each image of offsets counts as 128 more",
        integer,
    )
    header_seconds: float = setting(
        DEFAULT_HEADER_SECONDS,
        "--header-timeout",
        "SECONDS",
        "a caller whose header has not arrived after this time is cut off; for a request in one message, this and "
        "--payload-timeout are the time for all of it",
        number,
    )
    payload_seconds: float = setting(
        DEFAULT_PAYLOAD_SECONDS,
        "--payload-timeout",
        "SECONDS",
        "how long the payload of a request may take, whatever its size; a caller that is too slow for this is cut "
        "off earlier",
        number,
    )
    stall_seconds: float = setting(
        DEFAULT_STALL_SECONDS,
        "--stall-timeout",
        "SECONDS",
        "a caller that stops sending its request, or reading its answer, for this long is cut off",
        number,
    )
    shared_memory: bool = setting(
        DEFAULT_SHARED_MEMORY,
        "--shared-memory",
        "on|off",
        "accept tensors in memory that callers on this host share (also GPU memory that the server can reach), "
        "and calls, on a second socket for each unix: address of --listen (its path with .memory appended); "
        "everyone who may open that socket may use it",
        switch,
    )
    max_shared_bytes: int = setting(
        DEFAULT_MAX_SHARED_BYTES,
        "--max-shared-memory",
        "SIZE",
        "the most memory, of the host and of GPUs, that all callers on this host together may share with the server",
        parse_bytes,
    )
    reflection: bool = setting(
        DEFAULT_REFLECTION,
        "--reflection",
        "on|off",
        "tell tools such as grpcurl which services and messages there are (gRPC reflection)",
        switch,
    )
    joint_timeout_seconds: float = setting(
        DEFAULT_JOINT_TIMEOUT_SECONDS,
        "--joint-timeout",
        "SECONDS",
        "how long the ranks of a joint step wait for missing ranks; must be less than the timeout of their calls",
        number,
    )
    joint_regroup_seconds: float = setting(
        DEFAULT_JOINT_REGROUP_SECONDS,
        "--joint-regroup",
        "SECONDS",
        "with several servers: how long the ranks of a joint step wait before they are asked to call again, because "
        "the missing ranks may have reached another server; the wait doubles each time; 0: never",
        number,
    )
    joint_share: float = setting(
        DEFAULT_JOINT_SHARE,
        "--joint-share",
        "SHARE",
        "the largest share of --memory-budget and --max-requests that is held for missing ranks, for one run and for "
        "all runs of one caller; a run with more ranks needs more --max-requests",
        number,
    )
    max_runs: int = setting(
        DEFAULT_MAX_RUNS,
        "--max-runs",
        "N",
        "how many runs the metrics show, with loss and IoU, and waiting joint steps, and how many callers, with their "
        "device time; one that has been silent for a minute makes room for a new one",
        integer,
    )
    max_connection_age_seconds: float = setting(
        DEFAULT_MAX_CONNECTION_AGE_SECONDS,
        "--max-connection-age",
        "SECONDS",
        "clients must reconnect after about this time, and so learn of servers that were added to a name; 0: never",
        number,
    )
    drain_seconds: float = setting(
        DEFAULT_DRAIN_SECONDS,
        "--drain-seconds",
        "SECONDS",
        "how long accepted requests may take to finish after SIGTERM or SIGINT",
        number,
    )
    health_interval_seconds: float = setting(
        DEFAULT_HEALTH_INTERVAL_SECONDS,
        "--health-interval",
        "SECONDS",
        "how often an idle device is checked by letting it compute a known loss",
        number,
    )
    device_stall_seconds: float = setting(
        DEFAULT_DEVICE_STALL_SECONDS,
        "--device-stall",
        "SECONDS",
        "a device that takes longer than this for one batch, or its check, counts as unhealthy; the server ends (exit "
        "status 3) when its device has been unhealthy for as long",
        number,
    )
    otlp_endpoint: str = setting(
        DEFAULT_OTLP_ENDPOINT,
        "--otlp-endpoint",
        "URL",
        "send a span of each call and its phases to an OpenTelemetry collector by OTLP over gRPC: http://HOST:4317, or "
        "https:// for TLS (needs the extra otel; OTEL_EXPORTER_OTLP_ENDPOINT can set it, too, unless "
        "OTEL_EXPORTER_OTLP_PROTOCOL is another than grpc, and the other OTEL_* variables apply)",
        parse=_endpoint,
        others=("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"),
    )
    log_level: str = setting(DEFAULT_LOG_LEVEL, "--log-level", "LEVEL", ", ".join(LOG_LEVELS))
    log_format: str = setting(
        DEFAULT_LOG_FORMAT, "--log-format", "FORMAT", "text (for people) or json (one object on each line)"
    )

    def __post_init__(self) -> None:
        self._check_access()
        for address in self.addresses:
            path = wire.socket_path(address)
            if path is None:
                self._check_address("listen", address)
            else:
                self._check_socket_path(address, path)
        if len(set(self.addresses)) < len(self.addresses):
            self._refuse("listen", "each address once")
        self._check_address("metrics_listen", self.metrics_listen)
        if self.shared_memory and not self.socket_paths:
            self._refuse("listen", "at least one unix:/path with --shared-memory, with HOST:PORT beside it if needed")
        if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9]\d?))?", self.device):
            self._refuse("device", "auto, cpu, cuda or cuda:N")
        if self.memory_budget_bytes < _LEAST_BUDGET_BYTES:
            self._refuse("memory_budget_bytes", f"at least {format_bytes(_LEAST_BUDGET_BYTES)}")
        if not 0 < self.joint_share < 1:
            self._refuse("joint_share", "a number > 0 and < 1")
        for name in ("max_requests", "max_batch_elements", "max_batch_requests", "max_segments", "max_runs"):
            if getattr(self, name) < 1:
                self._refuse(name, "at least 1")
        if self.max_requests > _MOST_REQUESTS:
            self._refuse("max_requests", f"at most {_MOST_REQUESTS}")
        for name in ("max_batch_delay_seconds", "drain_seconds", "joint_regroup_seconds", "max_connection_age_seconds"):
            if not 0 <= getattr(self, name) <= _MOST_SECONDS:
                self._refuse(name, f"a number >= 0 and <= {_MOST_SECONDS}")
        for name in (
            "health_interval_seconds",
            "device_stall_seconds",
            "header_seconds",
            "payload_seconds",
            "stall_seconds",
            "joint_timeout_seconds",
        ):
            if not 0 < getattr(self, name) <= _MOST_SECONDS:
                self._refuse(name, f"a number > 0 and <= {_MOST_SECONDS}")
        if self.otlp_endpoint and not _ENDPOINT.match(self.otlp_endpoint):
            self._refuse("otlp_endpoint", _EXPECTED_ENDPOINT)
        if self.log_level not in LOG_LEVELS:
            self._refuse("log_level", " or ".join(LOG_LEVELS))
        if self.log_format not in LOG_FORMATS:
            self._refuse("log_format", " or ".join(LOG_FORMATS))

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses where to serve gRPC."""
        return tuple(address.strip() for address in self.listen.split(","))

    @property
    def socket_paths(self) -> tuple[str, ...]:
        """The paths of the Unix sockets among them."""
        return tuple(path for path in map(wire.socket_path, self.addresses) if path is not None)

    def _check_socket_path(self, address: str, path: str) -> None:
        if wire.lacks_slash(address):
            self._refuse("listen", f"unix:/path: after unix:// the path begins with another slash (unix:/{path})")
        longest, why = wire.MAX_SOCKET_PATH_BYTES, ""
        if self.shared_memory:
            longest -= len(wire.MEMORY_SUFFIX)
            why = f", as --shared-memory appends {wire.MEMORY_SUFFIX}"
        length = len(os.fsencode(path))
        if not 1 <= length <= longest:
            self._refuse("listen", f"unix:/path with a path of 1 to {longest} bytes{why} (this one has {length})")

    def _check_address(self, name: str, address: str) -> None:
        match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\s]+):(\d+)", address)
        if match is None or int(match[2]) > 65535:
            self._refuse(name, "HOST:PORT, such as 127.0.0.1:50051 or [::]:50051")

    @classmethod
    def load(cls, arguments: Sequence[str], environment: Mapping[str, str]) -> ServerConfig:
        """Reads flags and ``LOVASZ_*`` variables. Flags win over variables, which win over defaults.

        An empty variable counts as unset.

        Raises:
            ConfigError: a value is invalid.
            SystemExit: from argparse: for an unknown flag, and after ``--help``.
        """
        given = vars(_parser().parse_args(arguments))
        values: dict[str, object] = {}
        for f in fields(cls):
            flag, variable = f.metadata["flag"], variable_of(f.metadata["flag"])
            source, text = flag, given[f.name]
            for name in (variable, *(f.metadata["others"] if _sends_spans(environment) else ())):
                if text is None:
                    source, text = name, environment.get(name) or None
            if text is None:
                continue
            try:
                values[f.name] = f.metadata["parse"](text)
            except ValueError as error:
                raise ConfigError(f"{source}: {error}") from None
        return cls(**values)  # type: ignore[arg-type]


def _sends_spans(environment: Mapping[str, str]) -> bool:
    """Whether OpenTelemetry's endpoint is meant for this server: it speaks OTLP over gRPC alone."""
    protocol = environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environment.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    return environment.get("OTEL_SDK_DISABLED", "").lower() != "true" and protocol in (None, "", "grpc")


def settings() -> list[Field[Any]]:
    """All settings, in the order in which people read them: who may come in, last."""
    access = {f.name for f in fields(AccessSettings)}
    return sorted(fields(ServerConfig), key=lambda f: f.name in access)


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """``LOVASZ_*`` variables that are no setting: misspelt, or set by others (Kubernetes names some after services)."""
    known = CLIENT_VARIABLES | {variable_of(f.metadata["flag"]) for f in fields(ServerConfig)}
    return sorted(v for v in environment if v.startswith("LOVASZ_") and v not in known)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lovasz-server",
        description="Computes the Lovász losses and their gradients for segmentation trainers, over gRPC.",
        epilog="Each option can be set by an environment variable too: --memory-budget by LOVASZ_MEMORY_BUDGET, and so "
        "on; if both are set, the option is used. SIGTERM and SIGINT finish accepted requests, then exit 0.",
    )
    parser.add_argument("--version", action="version", version=f"lovasz-server {VERSION}")
    for f in settings():
        default = format_bytes(int(str(f.default))) if f.name.endswith("_bytes") else f.default
        switch = isinstance(f.default, bool)
        if switch:
            default = "on" if f.default else "off"
        parser.add_argument(
            f.metadata["flag"],
            dest=f.name,
            metavar=f.metadata["metavar"],
            nargs="?" if switch else None,
            const="on" if switch else None,
            help=f"{f.metadata['help']} (default: {'none' if default == '' else default})".replace("%", "%%"),
        )
    return parser
