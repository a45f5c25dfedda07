"""Who a caller is: for logs, for its fair share of the device, and for the runs that it began."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

import grpc

from lovasz.server.config import UNIX

CALLER_NAME: ContextVar[str] = ContextVar("caller_name", default="")
"""The name of the token that a call came with. gRPC runs a call in one context, from its metadata to its end."""


@dataclass(frozen=True)
class Identity:
    """Who made a call, as far as the server knows.

    Attributes:
        name: that of the caller's token; empty where the server asks for none.
        address: the other end of the connection, as gRPC writes it: ``ipv4:10.0.0.7:41234``, or ``unix:`` for every
            caller on a Unix socket, as gRPC does not tell these apart.
    """

    name: str
    address: str

    @classmethod
    def of(cls, context: grpc.ServicerContext) -> Identity:
        """The identity of who made a call."""
        return cls(CALLER_NAME.get(), context.peer())

    @property
    def connection(self) -> str:
        """Names the connection; empty for Unix sockets, whose connections nobody can tell apart."""
        return "" if self.address.startswith(UNIX) else self.address

    @property
    def owner(self) -> str:
        """Who owns what the caller begins: its token's name, else its host, without the port."""
        return self.name or (self.address.rpartition(":")[0] if self.connection else UNIX)

    @property
    def fields(self) -> dict[str, str]:
        """What the log says of the caller."""
        return {"peer": self.address, "caller": self.name} if self.name else {"peer": self.address}
