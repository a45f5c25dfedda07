"""Who may ask the HTTP server: under which host names, and with which tokens."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
import socket
from collections.abc import Iterable
from typing import Any, NamedTuple

from lovasz.server.access.tokens import Tokens, bearer
from lovasz.server.access_settings import ANY_HOST


class Refusal(NamedTuple):
    """Why a request is refused: HTTP's status, a text, and headers."""

    status: str
    text: str
    headers: tuple[tuple[str, str], ...] = ()


_UNAUTHENTICATED = Refusal(
    "401 Unauthorized",
    "expected a token of --metrics-tokens: as Bearer, or as Basic with its name as user",
    (("WWW-Authenticate", 'Basic realm="lovasz", charset="UTF-8"'), ("WWW-Authenticate", 'Bearer realm="lovasz"')),
)


class Guard:
    """Checks the headers of requests.

    A page of a foreign web site can let its own name point to this server's address, and would then be allowed to read
    the answers (DNS rebinding). Such a request has the site's name in its header Host, so names are checked.
    """

    def __init__(self, hosts: Iterable[str], tokens: Tokens | None, callers: Tokens | None = None) -> None:
        """Checks nothing yet.

        Args:
            hosts: names that may be in Host; ``.example.org`` stands for all below it, ``*`` for any.
            tokens: one of them must come along; None: nobody needs one.
            callers: those of gRPC: without one of them, names of runs are shortened where nobody needs ``tokens``;
                None: nobody needs one.
        """
        self._hosts = {*map(str.lower, hosts), socket.gethostname().lower()}
        self._tokens, self._callers = tokens, callers

    def refusal(self, environment: dict[str, Any]) -> Refusal | None:
        """Why a request (WSGI's environment) is refused; None if it may pass."""
        host = environment.get("HTTP_HOST")
        if host is not None and not self._may_be_asked_as(_name(host)):
            return Refusal(
                "403 Forbidden",
                f"Host: got {host[:200]!a}; expected an IP address, localhost, a name without a dot, or one of "
                "--metrics-hosts",
            )
        if self._tokens is not None and not self._is_known(self._tokens, environment.get("HTTP_AUTHORIZATION", "")):
            return _UNAUTHENTICATED
        return None

    def shows_names(self, environment: dict[str, Any]) -> bool:
        """Whether who asks, and was not refused, is shown the names of runs in full."""
        if self._tokens is not None or self._callers is None:
            return True
        return self._is_known(self._callers, environment.get("HTTP_AUTHORIZATION", ""))

    def _may_be_asked_as(self, name: str) -> bool:
        if ANY_HOST in self._hosts or name in self._hosts or _is_address(name):
            return True
        # Nobody can register a name without a dot: it is one of the local network, such as a service of Compose.
        if "." not in name or name.endswith(".localhost"):
            return bool(re.fullmatch(r"[a-z0-9._-]+", name))
        return any(host.startswith(".") and name.endswith(host) for host in self._hosts)

    @staticmethod
    def _is_known(tokens: Tokens, authorization: str) -> bool:
        token = bearer(authorization)
        if token is not None:
            return tokens.name_of(token) is not None
        scheme, _, encoded = authorization.strip().partition(" ")
        if scheme.lower() != "basic":
            return False
        try:
            user, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return False
        return tokens.name_of(password) == user


def _name(host: str) -> str:
    """The name or address in a header Host, without its port."""
    return re.sub(r":\d*$", "", host.strip()).strip("[]").rstrip(".").lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True
