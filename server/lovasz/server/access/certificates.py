"""The server's certificate with its key, and the CAs of its callers' certificates."""

from __future__ import annotations

import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from lovasz.server.access.watched_files import WatchedFiles
from lovasz.server.access_settings import AccessSettings

_PROBLEMS = {
    "KEY_VALUES_MISMATCH": "the key is not that of the certificate (if both are being replaced: not yet)",
    "NO_START_LINE": "no certificate or key in PEM, the text form that begins with -----BEGIN",
}
"""What ssl's reasons mean here."""


@dataclass(frozen=True)
class Certificates:
    """Files of a TLS server, as PEM.

    Attributes:
        chain: its certificate, then those of the CAs between it and the root.
        key: its private key.
        client_ca: the CAs that sign callers' certificates; empty: callers need none.
        context: the same for Python's ssl.
    """

    chain: bytes
    key: bytes = field(repr=False)
    client_ca: bytes
    context: ssl.SSLContext = field(repr=False, compare=False)

    @classmethod
    def parsed(cls, contents: Sequence[bytes]) -> Certificates:
        """From the contents of the files: chain, key, and the CAs of callers if they need a certificate.

        Raises:
            ValueError: a file is no PEM, or the key is not that of the certificate.
        """
        chain, key, client_ca = (*contents, b"")[:3]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            _load_pair(context, chain, key)
            if len(contents) > 2:
                context.load_verify_locations(cadata=client_ca.decode("ascii", errors="ignore"))
                context.verify_mode = ssl.CERT_REQUIRED
        except ssl.SSLError as error:
            raise ValueError(_PROBLEMS.get(error.reason, f"not valid ({error.reason or error})")) from None
        return cls(chain, key, client_ca, context)


def certificate_files(settings: AccessSettings) -> WatchedFiles[Certificates] | None:
    """The files that the settings name; None without TLS.

    Raises:
        ConfigError: they cannot be read, or are invalid.
    """
    if not settings.tls_cert_file:
        return None
    files = [("--tls-cert", settings.tls_cert_file), ("--tls-key", settings.tls_key_file)]
    if settings.tls_client_ca_file:
        files.append(("--tls-client-ca", settings.tls_client_ca_file))
    return WatchedFiles(files, Certificates.parsed)


def _load_pair(context: ssl.SSLContext, chain: bytes, key: bytes) -> None:
    """Loads what was read. Python's ssl takes only paths: files that are read twice could change in between."""

    def no_password() -> NoReturn:
        raise ValueError("the key has a password; expected one without")

    descriptor = os.memfd_create("certificates", os.MFD_CLOEXEC)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(key + b"\n" + chain)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}", password=no_password)
    finally:
        os.close(descriptor)
