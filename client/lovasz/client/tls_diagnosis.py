"""Why a connection with TLS failed: gRPC says little about it, so a second handshake, by Python's ssl, finds out."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from typing import TypeAlias

import grpc

from lovasz.client.access import TLS, Access
from lovasz.client.errors import TLSCheck, TLSError
from lovasz.client.target import addresses_of

_CONNECT_SECONDS = 1.0
_ADDRESSES = 4
"""The most addresses of a target that are tried."""
_CLEAR_CAUSES = ("Connection refused", "No such file", "Name or service not known", "DNS resolution failed")
"""gRPC's texts where no connection was made, so that TLS cannot be the cause."""

# OpenSSL's codes of failed checks (X509_V_ERR_...).
_EXPIRED, _NOT_YET_VALID = 10, 9
_WRONG_NAMES = (62, 64)
_UNKNOWN_ISSUERS = (2, 18, 19, 20, 21)

_Found: TypeAlias = tuple[TLSCheck, str]
"""TLSError's check, and a text."""

_ALERTS: dict[str, _Found] = {
    "CERTIFICATE_REQUIRED": (
        "client certificate missing",
        "the server asks for a client certificate; expected tls.cert",
    ),
    "CERTIFICATE_EXPIRED": ("client certificate refused", "this client's certificate (tls.cert) has expired"),
    "UNKNOWN_CA": ("client certificate refused", "the server does not know the CA of this client's certificate"),
    "HANDSHAKE_FAILURE": ("no agreement", "client and server have no TLS version, cipher or certificate in common"),
    "PROTOCOL_VERSION": ("no agreement", "client and server have no TLS version in common"),
}
"""What a server's alerts mean, by a part of their name in Python's ssl."""


def tls_problem(error: grpc.RpcError, target: str, access: Access) -> TLSError | None:
    """The error that says which check of TLS failed; None if TLS was not why a call failed.

    Takes a handshake with the server, and a second for each of its addresses that does not answer.
    """
    if error.code() is not grpc.StatusCode.UNAVAILABLE or error.trailing_metadata():
        return None
    if any(cause in (error.details() or "") for cause in _CLEAR_CAUSES):
        return None
    for address in addresses_of(target)[:_ADDRESSES]:
        host, _, port = address.rpartition(":")
        if not host:
            return None
        with contextlib.suppress(OSError):
            found = _refusal(host.strip("[]"), int(port), access.tls)
            if found is not None:
                return TLSError(f"{target}: {found[1]}", found[0])
    return None


def _refusal(host: str, port: int, tls: TLS | None) -> _Found | None:
    """TLSError's check that fails at an address, and a text; None if none does.

    Raises:
        OSError: it cannot be reached.
    """
    name = (tls and tls.server_name) or host
    try:
        context = _context(tls)
    except (ssl.SSLError, OSError) as error:
        reason = (error.reason if isinstance(error, ssl.SSLError) else error.strerror) or error
        return "files", f"the files of tls cannot be used: {reason}"
    with socket.create_connection((host, port), timeout=_CONNECT_SECONDS) as connection:
        try:
            with context.wrap_socket(connection, server_hostname=name) as secured:
                if tls is None:
                    return _speaks_tls()
                return _refused_client(tls) if _is_closed(secured) else None
        except ssl.SSLCertVerificationError as error:
            return _failed_check(error, name)
        except ssl.SSLError as error:
            return _alert(error.reason or "", tls)
        except TimeoutError:
            return None


def _context(tls: TLS | None) -> ssl.SSLContext:
    """The same checks as gRPC makes; none at all to find out whether a server speaks TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    if tls is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context
    if tls.ca is None:
        context.load_default_certs()
    else:
        context.load_verify_locations(os.fspath(tls.ca))
    if tls.cert is not None and tls.key is not None:
        context.load_cert_chain(os.fspath(tls.cert), os.fspath(tls.key), password="")
    return context


def _is_closed(secured: ssl.SSLSocket) -> bool:
    """Whether a server ends the connection after the handshake, as some do that refuse a client's certificate.

    A server that lets the client in sends a byte at once.

    Raises:
        ssl.SSLError: it says why it ends the connection.
    """
    try:
        return not secured.recv(1)
    except (ssl.SSLEOFError, ConnectionResetError):
        return True


def _refused_client(tls: TLS) -> _Found:
    closed = "the server closed the connection after the handshake"
    if tls.cert is None:
        return "client certificate missing", f"{closed}: it asks for a client certificate; expected tls.cert"
    if _has_expired(tls):
        return _ALERTS["CERTIFICATE_EXPIRED"]
    return (
        "client certificate refused",
        f"{closed}: it refuses this client's certificate (tls.cert); expected one that is signed by a CA it knows",
    )


def _has_expired(tls: TLS) -> bool:
    """Whether this client's certificate has expired: found out by showing it to a server in memory."""
    client, server = _context(None), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for context in (client, server):
        context.load_cert_chain(str(tls.cert), str(tls.key))
    server.load_verify_locations(str(tls.cert))
    server.verify_mode, server.verify_flags = ssl.CERT_REQUIRED, server.verify_flags | ssl.VERIFY_X509_PARTIAL_CHAIN
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)
    for side in sides * 2:
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as error:
            return error.verify_code == _EXPIRED
    return False


def _failed_check(error: ssl.SSLCertVerificationError, name: str) -> _Found:
    code, said = error.verify_code, error.verify_message
    if code == _EXPIRED:
        return "expired", "the server's certificate has expired"
    if code == _NOT_YET_VALID:
        return "not yet valid", "the server's certificate is not valid yet (is the clock of this host right?)"
    if code in _WRONG_NAMES:
        return "wrong host", f"the server's certificate is not for {name}; expected that name in it, or tls.server_name"
    if code in _UNKNOWN_ISSUERS:
        return "unknown CA", f"no CA that this client knows (tls.ca) has signed the server's certificate: {said}"
    return "other", f"the server's certificate was refused: {said}"


def _alert(reason: str, tls: TLS | None) -> _Found | None:
    if "ALERT" not in reason:
        return None if tls is None else ("no TLS", f"the server speaks no TLS there, but tls is given ({reason})")
    if tls is None:
        return _speaks_tls()
    for part, meaning in _ALERTS.items():
        if part in reason:
            return meaning
    return "other", f"the server ended the handshake: {reason.replace('_', ' ').lower()}"


def _speaks_tls() -> _Found:
    return "TLS needed", "the server speaks TLS; expected tls=TLS(...)"
