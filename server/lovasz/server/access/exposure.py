"""Whether strangers can reach the server, and what would keep them out."""

from __future__ import annotations

import logging

from lovasz.server import addresses
from lovasz.server.config import ServerConfig, socket_path

_log = logging.getLogger(__name__)


def warn_if_open(config: ServerConfig) -> None:
    """Logs a warning if gRPC is served beyond this host to anyone, or in plain text."""
    beyond = [
        address
        for address in config.addresses
        if socket_path(address) is None and not addresses.are_loopback(addresses.split(address)[0])
    ]
    if not beyond:
        return
    missing = []
    if not config.tls_cert_file:
        missing.append("TLS (--tls-cert, --tls-key): tensors and tokens can be read and changed on their way")
    if not config.tokens_file and not config.tls_client_ca_file:
        missing.append("tokens or client certificates (--tokens, --tls-client-ca): whoever reaches the port may use it")
    if missing:
        _log.warning(
            "OPEN TO THE NETWORK: docs/security.md says how to close it",
            extra={"listen": ",".join(beyond), "missing": "; ".join(missing)},
        )
