"""HTTP proxies: which target may go through one, and which variable of the environment names it."""

from __future__ import annotations

import os

from lovasz.client.target import addresses_of, is_loopback

_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
"""Those that gRPC looks at, in its order."""


def enabled_option(target: str, wanted: bool) -> tuple[str, int]:
    """gRPC's option for a channel. By default gRPC would send calls to this host to the proxy, too."""
    return ("grpc.enable_http_proxy", int(wanted and not is_on_this_host(target)))


def remark(target: str, wanted: bool) -> str:
    """What an error says of the proxy that the environment names; empty if it names none, or none is of use."""
    variable = next((name for name in _VARIABLES if os.environ.get(name)), None)
    if variable is None or is_on_this_host(target):
        return ""
    if wanted:
        return f"; the call went through the proxy that the variable {variable} names, unless no_proxy lists the host"
    return f"; the proxy that the variable {variable} names was not used (http_proxy=True uses it)"


def is_on_this_host(target: str) -> bool:
    """Whether an address of a target is one of this host."""
    return any(is_loopback(address) or _is_below_localhost(address) for address in addresses_of(target))


def _is_below_localhost(address: str) -> bool:
    return address.rpartition(":")[0].lower().endswith(".localhost")
