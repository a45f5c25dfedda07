"""Resolves the host names that the server listens on: a name is bound at all its addresses, or not at all."""

from __future__ import annotations

import errno
import ipaddress
import socket
from contextlib import ExitStack

LOCALHOST = ("127.0.0.1", "::1")
"""What ``localhost`` means to every client (RFC 6761), even if the resolver of this host names only one of them."""

_ATTEMPTS = 20
"""Attempts to find a port that is free at all addresses of a name."""


def free_addresses(host: str, port: int) -> tuple[list[str], int]:
    """The IP addresses of a host, after a check that the port is free at all of them, and the port.

    If a server bound only some addresses of a name, calls to the name could reach another server at the rest.

    Args:
        host: a name or an IP address, without brackets.
        port: 0 takes a port that is free at all addresses; for a single address it is left to whoever binds it.

    Raises:
        OSError: the name has no address, or the port is not free at all of them. The text names the address.
    """
    addresses = _resolved(host, port)
    for attempt in range(_ATTEMPTS):
        try:
            return _probed(addresses, port)
        except OSError as error:
            if port != 0 or error.errno != errno.EADDRINUSE or attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError


def are_loopback(host: str) -> bool:
    """Whether only this host can reach the addresses of a name or IP address; False if the name has none."""
    try:
        return all(ipaddress.ip_address(one.partition("%")[0]).is_loopback for one in _resolved(host, 0))
    except OSError:
        return False


def split(address: str) -> tuple[str, int]:
    """The host (without brackets) and the port of HOST:PORT."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def joined(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _resolved(host: str, port: int) -> list[str]:
    if host == "::" and not socket.has_dualstack_ipv6():
        return ["0.0.0.0"]
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    return list(dict.fromkeys([*addresses, *LOCALHOST] if host.lower() == "localhost" else addresses))


def _probed(addresses: list[str], port: int) -> tuple[list[str], int]:
    """The addresses that this host has, and the port, free at all of them."""
    had, common, missing = [], port, OSError(errno.EADDRNOTAVAIL, "this host has no such address")
    with ExitStack() as probes:
        for address in addresses:
            try:
                probe = probes.enter_context(socket.socket(_family(address), socket.SOCK_STREAM))
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if address == "::":  # gRPC serves IPv4 on it, too.
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                probe.bind((address, common))
            except OSError as error:
                if not _nobody_can_be_at(address, error):
                    raise OSError(error.errno, f"{joined(address, common)}: {error.strerror}") from error
                missing = error
                continue
            had.append(address)
            common = probe.getsockname()[1]
    if not had:
        raise missing
    return had, common if len(had) > 1 else port


def _nobody_can_be_at(address: str, error: OSError) -> bool:
    """Whether an address cannot be bound because this host lacks IPv6: no other server can be reached at it then."""
    if error.errno == errno.EAFNOSUPPORT:
        return True
    return error.errno == errno.EADDRNOTAVAIL and ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
