"""What both sides of a connection agree on: who a caller is, when it may try again, and how they notice that
the other side has vanished."""

from __future__ import annotations

_PING_EVERY_MS = 15_000
_PING_TIMEOUT_MS = 12_000

CLIENT_KEY = "lovasz-client"
"""Metadata of calls on a Unix socket, where gRPC does not tell callers apart: random hexadecimal digits, one text a
client."""

PUSHBACK_KEY = "grpc-retry-pushback-ms"
"""Trailing metadata of an error: the milliseconds after which to try again; negative: never."""

KEEPALIVE_OPTIONS = (
    ("grpc.keepalive_time_ms", _PING_EVERY_MS),
    # gRPC uses this one for TCP's own timeout, and newer versions of gRPC the next one for the answer to a ping.
    ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", _PING_TIMEOUT_MS),
    # By default no ping is sent after two without data between: a call may wait for longer.
    ("grpc.http2.max_pings_without_data", 0),
)
"""A peer that has vanished is noticed within half a minute. A server has to accept pings that are this frequent."""
