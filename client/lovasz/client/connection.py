"""A client's connection to a server: its channels, what calls carry beside their message, and how they fail."""

from __future__ import annotations

import os
import secrets
from urllib.parse import quote

import grpc

from lovasz import wire
from lovasz.client.channels import Channels
from lovasz.client.errors import CallCancelledError, InvalidInputError, TLSError, from_rpc_error, speaks_no_grpc
from lovasz.client.load_balancing import HASH_PROBLEM, RUN_KEY, LoadBalancing, cannot_hash, service_config
from lovasz.client.options import ClientOptions
from lovasz.client.proxy import enabled_option, is_on_this_host, remark
from lovasz.client.retry import Retries
from lovasz.client.tls_diagnosis import tls_problem
from lovasz.client.tracing import trace_metadata
from lovasz.v1 import loss_pb2 as pb

_OPTIONS = (
    # Each channel gets its own connections; by default gRPC shares one among all clients of a process.
    ("grpc.use_local_subchannel_pool", 1),
    # lovasz.client.retry repeats calls instead.
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.http2.max_frame_size", wire.MAX_FRAME_BYTES),
    *wire.KEEPALIVE_OPTIONS,
    # By default a client may take two minutes to reconnect to a server that restarted.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)
"""gRPC's options for every channel."""


_IDENTITY_BYTES = 8


class Connection:
    """The channels to a server, which connect at the first call.

    Attributes:
        channels: the server's methods.
        retries: repeats calls.
    """

    def __init__(self, target: str, options: ClientOptions) -> None:
        """Opens the channels.

        Raises:
            ValueError: a file of certificates or tokens cannot be read, or a token would go out in plain text.
        """
        self._target, self._access, self._http_proxy = target, options.access, options.http_proxy
        self._load_balancing = options.load_balancing if wire.socket_path(target) is None else None
        is_local = wire.socket_path(target) is not None
        self._identity = ((wire.CLIENT_KEY, secrets.token_hex(_IDENTITY_BYTES)),) if is_local else ()
        self._authorization = options.access.authorization(target)
        self._closed = False
        self._process = os.getpid()
        channel_options = (
            *_OPTIONS,
            enabled_option(target, options.http_proxy),
            ("grpc.service_config", service_config(self._load_balancing)),
        )
        messages, streams = (options.access.channel(target, channel_options) for _ in range(2))
        self.channels = Channels(messages, streams)
        self.retries = Retries(self._is_permanent)

    def metadata(self, joint: wire.Joint | None) -> tuple[tuple[str, str], ...]:
        """The metadata of a call: its run, by which gRPC and proxies find its server, who calls, and the trace."""
        run = () if joint is None else ((RUN_KEY, quote(joint.run, safe="")),)
        return (*run, *self._identity, *self._authorization.metadata(), *trace_metadata())

    def info(self, timeout: float) -> pb.GetServerInfoResponse:
        """What the server says of itself.

        Raises:
            grpc.RpcError: no server answers, or not in time.
        """
        metadata = self.metadata(None)
        info: pb.GetServerInfoResponse = self.channels.info(
            pb.GetServerInfoRequest(), timeout=timeout, metadata=metadata
        )
        return info

    def check_open(self) -> None:
        """Does nothing while the connection is open.

        Raises:
            CallCancelledError: it was closed.
        """
        if self._closed:
            raise CallCancelledError(f"{self._target}: the client was closed")

    def translated(self, error: Exception) -> Exception:
        """The client's error for one that a call has raised.

        Args:
            error: one of gRPC; or a ValueError, which gRPC raises for a channel that was closed meanwhile.

        Returns:
            The error itself if it is another ValueError.
        """
        if self._closed:
            return CallCancelledError(f"{self._target}: the client was closed")
        if not isinstance(error, grpc.RpcError):
            return error
        if self._load_balancing is LoadBalancing.RING_HASH and cannot_hash(error):
            return InvalidInputError("load_balancing", HASH_PROBLEM)
        problem = self._tls_problem(error)
        if problem is not None:
            return problem
        unreachable = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        return from_rpc_error(error, self._target, remark(self._target, self._http_proxy) if unreachable else "")

    def _tls_problem(self, error: grpc.RpcError) -> TLSError | None:
        through_proxy = self._http_proxy and not is_on_this_host(self._target)
        return None if through_proxy else tls_problem(error, self._target, self._access)

    def _is_permanent(self, error: grpc.RpcError) -> bool:
        return speaks_no_grpc(error) or self._tls_problem(error) is not None

    def close(self) -> None:
        """Ends the channels and all calls; after a fork, in the child, it only makes no more calls."""
        self._closed = True
        self.retries.close()
        # A child would wait forever for the end of calls that its parent was making at the fork.
        if self._process == os.getpid():
            self.channels.close()
