"""How a client calls its target: one frozen value, checked when it is built."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from enum import Enum
from numbers import Real

from lovasz import wire
from lovasz.client.access import Access
from lovasz.client.load_balancing import LoadBalancing
from lovasz.spec.checks import flag

DEFAULT_TIMEOUT_SECONDS = 60.0
_MAX_TIMEOUT_SECONDS = 1e8
"""Three years: gRPC accepts no infinite timeout."""


class Transport(Enum):
    """How tensors get to a server and back."""

    AUTO = "auto"
    """Through shared memory where the server takes it, else over gRPC."""
    GRPC = "grpc"
    """Over gRPC only."""
    SHM = "shm"
    """Through shared memory only."""


OVER_GRPC = "grpc"
IN_SHARED_MEMORY = "shm"
IN_DEVICE_MEMORY = "device"
ASKED_OVER_GRPC = "+grpc"
"""The ways of requests, as ``spec.Timing.transport`` tells them."""

TRANSPORTS = tuple(transport.value for transport in Transport)
LOAD_BALANCING = tuple(balancing.value for balancing in LoadBalancing)


@dataclass(frozen=True)
class ClientOptions:
    """The options of a client.

    Attributes:
        timeout: seconds for a call with all its retries; more than 1e8 counts as 1e8.
        transport: how tensors travel.
        wire_dtype: the element type in which logits and gradient travel; None: the logits' own.
        load_balancing: which of several servers a call goes to; None: the first that answers.
        run: the training's name in the server's metrics; empty: none.
        http_proxy: whether connections go through the HTTP proxy that the environment names.
        access: TLS and token.

    Raises:
        ValueError: an option has an invalid value.
    """

    timeout: float = DEFAULT_TIMEOUT_SECONDS
    transport: Transport = Transport.AUTO
    wire_dtype: wire.DType | None = None
    load_balancing: LoadBalancing | None = None
    run: str = ""
    http_proxy: bool = False
    access: Access = field(default_factory=Access)

    def __post_init__(self) -> None:
        object.__setattr__(self, "timeout", checked_timeout(self.timeout))
        if self.transport is Transport.SHM and not wire.CAN_SHARE_MEMORY:
            raise ValueError(f"transport: got 'shm' on {sys.platform}; expected Linux")
        if self.wire_dtype is not None and not self.wire_dtype.is_float:
            raise ValueError(_wire_dtype_problem(self.wire_dtype.name))
        object.__setattr__(self, "http_proxy", flag("http_proxy", self.http_proxy))
        if not isinstance(self.run, str):
            raise ValueError(f"run: got {self.run!r}; expected a text")
        if len(self.run) > wire.MAX_RUN_CHARACTERS:
            raise ValueError(f"run: got {len(self.run)} characters; expected at most {wire.MAX_RUN_CHARACTERS}")

    @classmethod
    def parsed(
        cls,
        *,
        timeout: float,
        transport: str,
        wire_dtype: str | None,
        load_balancing: str | None,
        run: str | None,
        http_proxy: bool = False,
        access: Access | None = None,
    ) -> ClientOptions:
        """The options from the arguments of :class:`LossClient`.

        Raises:
            ValueError: an argument has an invalid value.
        """
        if transport not in TRANSPORTS:
            raise ValueError(f"transport: got {transport!r}; expected one of {', '.join(TRANSPORTS)}")
        if wire_dtype is not None and wire_dtype not in wire.FLOATS:
            raise ValueError(_wire_dtype_problem(wire_dtype))
        if load_balancing is not None and load_balancing not in LOAD_BALANCING:
            raise ValueError(
                f"load_balancing: got {load_balancing!r}; expected None or one of {', '.join(LOAD_BALANCING)}"
            )
        return cls(
            timeout=timeout,
            transport=Transport(transport),
            wire_dtype=None if wire_dtype is None else wire.dtype_named(wire_dtype),
            load_balancing=None if load_balancing is None else LoadBalancing(load_balancing),
            run="" if run is None else run,
            http_proxy=http_proxy,
            access=access or Access(),
        )


def checked_timeout(timeout: float) -> float:
    """The timeout of a call, in seconds.

    Raises:
        ValueError: it is not a number above 0.
    """
    if not isinstance(timeout, Real) or not timeout > 0:
        raise ValueError(f"timeout: got {timeout!r}; expected seconds > 0")
    return min(timeout, _MAX_TIMEOUT_SECONDS)


def _wire_dtype_problem(name: str) -> str:
    return f"wire_dtype: got {name!r}; expected None or one of {', '.join(wire.FLOATS)}"
