"""Who a caller is: for logs, for its fair share of the device, and for the runs that it began."""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import replace
from typing import NamedTuple

from lovasz import wire
from lovasz.server.schedule.job import CONNECTION, RUN, TOKEN, Tenant
from lovasz.server.schedule.joint.group import Run
from lovasz.server.transport.carrier import Carrier

CALLER_NAME: ContextVar[str] = ContextVar("caller_name", default="")
"""The name of the token that a call came with. gRPC runs a call in one context, from its metadata to its end."""


_CLIENT = re.compile(r"[0-9a-f]{8,32}")


class Identity(NamedTuple):
    """Who made a call, as far as the server knows.

    Attributes:
        name: that of the caller's token; empty where the server asks for none.
        address: the other end of the connection, as gRPC writes it: ``ipv4:10.0.0.7:41234``. On a Unix socket, where
            gRPC does not tell callers apart, what the client calls itself: ``unix:client=3f9a...``, or ``unix:`` if it
            does not; ``unix:uid=1000,pid=4711`` on the shared-memory socket, or ``unix:uid=1000,connection=3`` for a
            process of another PID namespace.
    """

    name: str
    address: str

    @classmethod
    def of(cls, carrier: Carrier) -> Identity:
        """The identity of who made a call."""
        return cls(CALLER_NAME.get(), cls.at(carrier.peer(), carrier.invocation_metadata()))

    @staticmethod
    def at(peer: str, metadata: Iterable[tuple[str, str | bytes]]) -> str:
        """The address of who made a call, of what ``Carrier`` knows."""
        if not _is_shared(peer):
            return peer
        client = next((value for key, value in metadata if key == wire.CLIENT_KEY), "")
        return f"{wire.UNIX}client={client}" if isinstance(client, str) and _CLIENT.fullmatch(client) else peer

    @property
    def connection(self) -> str:
        """Names the connection, or the client; empty for a Unix socket's callers that nobody can tell apart."""
        return "" if _is_shared(self.address) else self.address

    def sealed(self, joint: wire.Joint, key: bytes) -> wire.Joint:
        """A rank's place, with who owns its run in place of the secret, which goes no further.

        The owner stands for the secret, else for the name; it is empty if there is neither.

        Args:
            key: that of this server, random: owners can be compared without telling anything about secrets.
        """
        if joint.secret:
            return replace(joint, secret=hmac.digest(key, b"secret " + joint.secret, "sha256"))
        return replace(joint, secret=hmac.digest(key, b"name " + self.name.encode(), "sha256")) if self.name else joint

    def tenant(self, request: wire.Request) -> Tenant:
        """Whom a request belongs to in the queue: the token's name, else the run of a joint step, else the connection.

        Where connections cannot be told apart, the run that a request names counts, if there is one.

        Args:
            request: with a sealed ``joint``.
        """
        if self.name:
            return Tenant(TOKEN, self.name)
        if request.joint is not None:
            return Tenant(RUN, *Run.of(request.joint))
        if self.connection or not request.run:
            return Tenant(CONNECTION, self.address)
        return Tenant(RUN, request.run)

    @property
    def fields(self) -> dict[str, str]:
        """What the log says of the caller."""
        return {"peer": self.address, "caller": self.name} if self.name else {"peer": self.address}


def _is_shared(address: str) -> bool:
    """Whether it is that of every caller on a Unix socket."""
    return address.startswith(wire.UNIX) and "=" not in address
