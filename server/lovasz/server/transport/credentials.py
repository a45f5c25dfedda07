"""TLS for gRPC's ports: each new connection gets the certificate that the files hold then."""

from __future__ import annotations

import grpc

from lovasz.server.access.certificates import Certificates
from lovasz.server.access.watched_files import WatchedFiles


def server_credentials(files: WatchedFiles[Certificates]) -> grpc.ServerCredentials:
    """Credentials that follow the files. gRPC speaks TLS 1.2 and 1.3."""
    served = files.value

    def changed() -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC before each handshake."""
        nonlocal served
        if files.value is served:
            return None
        served = files.value
        return _configuration(served)

    needs_client_certificate = bool(served.client_ca)
    return grpc.dynamic_ssl_server_credentials(
        _configuration(served),
        changed,  # type: ignore[arg-type]  # None says that nothing has changed.
        needs_client_certificate,
    )


def _configuration(certificates: Certificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(certificates.key, certificates.chain)], certificates.client_ca or None
    )
