"""What a target is: the place where a client's losses are computed, a server or this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from lovasz import spec, wire
from lovasz.client.tensors import Array


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


class Target(Protocol):
    """Where losses are computed."""

    def prepare(
        self, logits: Array, labels: Array, loss: spec.WeightedSum, want_grad: bool, joint: wire.Joint | None
    ) -> PreparedCall:
        """Checks a request and copies what it needs from arrays that are not on the host in the wire's form.

        Raises:
            InvalidInput: the request is invalid.
        """

    def server_info(self, timeout: float) -> ServerInfo:
        """What the target is, asked within ``timeout`` seconds.

        Raises:
            LossError: the target did not answer.
        """

    def close(self) -> None:
        """Ends its connections."""
