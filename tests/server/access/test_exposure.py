"""The warning of a server that strangers can reach."""

from __future__ import annotations

import pytest

from lovasz.server.access.exposure import warn_if_open
from lovasz.server.config import ServerConfig

PAIR = {"tls_cert_file": "cert", "tls_key_file": "key"}


@pytest.mark.parametrize(
    ("listen", "access", "missing"),
    [
        ("127.0.0.1:0,[::1]:0,localhost:0,unix:/tmp/x", {}, ()),
        ("0.0.0.0:0", {}, ("TLS", "tokens or client certificates")),
        ("127.0.0.1:0,[::]:1", {"tokens_file": "tokens"}, ("TLS",)),
        ("192.0.2.1:1", PAIR, ("tokens or client certificates",)),
        ("192.0.2.1:1", {**PAIR, "tokens_file": "tokens"}, ()),
        ("192.0.2.1:1", {**PAIR, "tls_client_ca_file": "ca"}, ()),
        ("127.0.0.1:0", {"metrics_listen": "0.0.0.0:9095"}, ()),
        ("127.0.0.1:0", {"metrics_listen": "0.0.0.0:9095", "metrics_tokens_file": "tokens"}, ("TLS for the metrics",)),
        ("127.0.0.1:0", {"metrics_listen": "127.0.0.1:9095", "metrics_tokens_file": "tokens"}, ()),
    ],
)
def test_what_is_missing_is_said_in_one_line(
    listen: str, access: dict[str, str], missing: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    warn_if_open(ServerConfig(listen=listen, **access))  # type: ignore[arg-type]
    assert len(caplog.records) == bool(missing)
    for record in caplog.records:
        assert record.getMessage() == "OPEN TO THE NETWORK: docs/security.md says how to close it"
        assert [part.partition(" (")[0] for part in vars(record)["missing"].split("; ")] == list(missing)
        assert "127.0.0.1" not in vars(record)["listen"]
