"""What a target is: the place where a client's losses are computed, a server or this process."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from typing import Any, Protocol

from lovasz import spec, wire
from lovasz.client.tensors import AnyArray

INPROCESS = "inprocess"
"""The target that is this process."""

_SCHEMES_WITH_PORTS = ("dns", "ipv4", "ipv6")
_OTHER_SCHEMES = ("unix-abstract", "vsock", "xds", "google-c2p")
_EXPECTED = "expected HOST:PORT, unix:/path or 'inprocess'"


def checked_target(target: str) -> str:
    """The target, after a check that gRPC can understand it.

    Raises:
        ValueError: it names no server; the text says what is expected.
    """
    if not isinstance(target, str) or not target:
        raise ValueError(f"target: got {target!r}; {_EXPECTED}")
    scheme, separator, _ = target.partition(":")
    if target == INPROCESS or (separator and scheme in _OTHER_SCHEMES):
        return target
    path = wire.socket_path(target)
    if path is not None:
        if wire.lacks_slash(target):
            raise ValueError(
                f"target: got {target!r}; {_EXPECTED}: after unix:// the path begins with another slash: unix:/{path}"
            )
        length = len(os.fsencode(path))
        if not 1 <= length <= wire.MAX_SOCKET_PATH_BYTES:
            raise ValueError(
                f"target: got {target!r}, a path of {length} bytes; expected 1 to {wire.MAX_SOCKET_PATH_BYTES}, the "
                "limit of Unix sockets"
            )
        return target
    if "://" in target and scheme not in _SCHEMES_WITH_PORTS:
        raise ValueError(
            f"target: got {target!r}; {_EXPECTED}: without {scheme}://, and with the port of gRPC (50051 by default), "
            "not that of the metrics"
        )
    for address in addresses_of(target):
        _check_address(address, target)
    return target


def addresses_of(target: str) -> list[str]:
    """The parts of a target that are HOST:PORT; ``[""]`` for a Unix socket, and none if only gRPC knows them."""
    scheme, separator, rest = target.partition(":")
    if scheme in ("unix", "unix-abstract") and separator:
        return [""]
    if scheme in _OTHER_SCHEMES and separator:
        return []
    if scheme in _SCHEMES_WITH_PORTS and separator:
        return (rest.rpartition("/")[2] if scheme == "dns" else rest).split(",")
    return [target]


def is_loopback(address: str) -> bool:
    """Whether an element of ``addresses_of`` is certainly one of this host."""
    host = address.rpartition(":")[0].strip("[]").lower()
    if not host:
        return True  # A Unix socket.
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_address(address: str, target: str) -> None:
    host, _, port = address.rpartition(":")
    if ":" in host and not re.fullmatch(r"\[[^\[\]]+\]", host):
        raise ValueError(f"target: got {target!r}; {_EXPECTED}, with an IPv6 address in brackets: [::1]:50051")
    if not re.search(r":\d+$", address):
        raise ValueError(f"target: got {target!r}, without a port; {_EXPECTED} (a server's default port is 50051)")
    if not host or not re.fullmatch(r"[^\s/]+", host) or not 1 <= int(port) <= 65535:
        raise ValueError(f"target: got {target!r}; {_EXPECTED}")


@dataclass(frozen=True)
class Device:
    """A device that a server computes on.

    Attributes:
        name: torch's name for it, such as ``"cuda:0"``.
        hardware: the hardware's own name.
        healthy: whether it answered its last check.
        starting: whether the server still compiles what it will run on it; it is not healthy until then.
    """

    name: str
    hardware: str
    healthy: bool
    starting: bool = False


@dataclass(frozen=True)
class ServerInfo:
    """What a server is, and its limits.

    Attributes:
        version: its version of lovasz.
        devices: what it computes on.
        losses: the kinds of losses that it computes.
        memory_budget_bytes: the most tensor bytes that it holds at a time, and so the most that one request can have.
        max_requests: the most requests that it holds at a time.
    """

    version: str
    devices: tuple[Device, ...]
    losses: tuple[str, ...]
    memory_budget_bytes: int
    max_requests: int


class PreparedCall(Protocol):
    """A request that was checked and is ready to be computed, once."""

    def compute(self, timeout: float) -> spec.Result[Any]:
        """Computes it within ``timeout`` seconds.

        Raises:
            InvalidInput: the target refuses the request.
            LossError: the computation failed.
        """

    def discard(self) -> None:
        """Gives back what it holds, in place of ``compute``."""


class Target(Protocol):
    """Where losses are computed."""

    def prepare(
        self,
        logits: AnyArray,
        labels: AnyArray,
        loss: spec.WeightedSum,
        want_grad: bool,
        joint: wire.Joint | None,
        offsets: AnyArray | None,
        timeout: float,
    ) -> PreparedCall:
        """Checks a request and copies what it needs from arrays that are not on the host in the wire's form.

        Args:
            timeout: seconds that it may take to ask a server where the arrays can be.

        Raises:
            InvalidInput: the request is invalid.
        """

    def abort_step(self, abort: wire.Abort, timeout: float) -> None:
        """Ends a joint step in which a rank cannot take part; tries once.

        Raises:
            LossError: the target does not know it.
        """

    def leave_run(self, leave: wire.Leave, timeout: float) -> None:
        """Lets the other ranks of a run go on without one.

        Raises:
            LossError: the target does not know it.
        """

    def server_info(self, timeout: float) -> ServerInfo:
        """What the target is, asked within ``timeout`` seconds.

        Raises:
            LossError: the target did not answer.
        """

    def transport(self, timeout: float, *, on_gpu: bool) -> str:
        """The way that requests take, as ``spec.Timing.transport`` tells it; empty without a server.

        Args:
            timeout: seconds to ask the server.
            on_gpu: of tensors that are on a GPU.

        Raises:
            LossError: there is none.
        """

    def close(self) -> None:
        """Ends its connections."""
