"""Whether strangers can reach the server, and what would keep them out."""

from __future__ import annotations

import logging

from lovasz.server import addresses
from lovasz.server.config import ServerConfig
from lovasz.wire import socket_path

_log = logging.getLogger(__name__)


def warn_if_open(config: ServerConfig) -> None:
    """Logs a warning if anyone beyond this host may use gRPC, or if tensors or tokens travel there in plain text."""
    beyond = [address for address in config.addresses if _is_beyond(address)]
    missing = []
    if beyond and not config.tls_cert_file:
        missing.append("TLS (--tls-cert, --tls-key): tensors and tokens can be read and changed on their way")
    if beyond and not config.tokens_file and not config.tls_client_ca_file:
        missing.append("tokens or client certificates (--tokens, --tls-client-ca): whoever reaches the port may use it")
    if config.metrics_tokens_file and not config.metrics_tls and _is_beyond(config.metrics_listen):
        beyond.append(config.metrics_listen)
        missing.append("TLS for the metrics (--metrics-tls): their tokens can be read on their way")
    if missing:
        _log.warning(
            "OPEN TO THE NETWORK: docs/security.md says how to close it",
            extra={"listen": ",".join(beyond), "missing": "; ".join(missing)},
        )


def _is_beyond(address: str) -> bool:
    """Whether others than this host can reach an address."""
    return socket_path(address) is None and not addresses.are_loopback(addresses.split(address)[0])
