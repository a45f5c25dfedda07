"""The settings that say who may come in: TLS, tokens, and the names under which the metrics are asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lovasz.server.settings import Settings, setting, switch

DEFAULT_TLS_CERT_FILE = DEFAULT_TLS_KEY_FILE = DEFAULT_TLS_CLIENT_CA_FILE = ""
DEFAULT_TOKENS_FILE = DEFAULT_METRICS_TOKENS_FILE = ""
DEFAULT_METRICS_TLS = False
DEFAULT_METRICS_HOSTS = ""

ANY_HOST = "*"


@dataclass(frozen=True)
class AccessSettings(Settings):
    """Who may come in. An empty file name means: none."""

    tls_cert_file: str = setting(
        DEFAULT_TLS_CERT_FILE,
        "--tls-cert",
        "FILE",
        "the server's certificate and its chain (PEM): HOST:PORT of --listen then speaks TLS 1.2 or newer. Read again "
        "when it changes. Unix sockets have no TLS",
    )
    tls_key_file: str = setting(
        DEFAULT_TLS_KEY_FILE, "--tls-key", "FILE", "the private key of --tls-cert (PEM, without a password)"
    )
    tls_client_ca_file: str = setting(
        DEFAULT_TLS_CLIENT_CA_FILE,
        "--tls-client-ca",
        "FILE",
        "only callers with a certificate that one of these CAs has signed (PEM) may connect (mutual TLS)",
    )
    tokens_file: str = setting(
        DEFAULT_TOKENS_FILE,
        "--tokens",
        "FILE",
        "only calls with a token of this file are answered, except health checks and calls on Unix sockets. Each line "
        "is name:token or name:sha256:HASH (`lovasz token NAME` makes it), and may end with limits of the name: "
        "budget=SHARE (of --memory-budget and --max-requests) and weight=NUMBER (in the queue). Read again when it "
        "changes",
    )
    metrics_tls: bool = setting(
        DEFAULT_METRICS_TLS,
        "--metrics-tls",
        "on|off",
        "serve --metrics-listen over HTTPS, with the files of --tls-cert, --tls-key and --tls-client-ca",
        switch,
    )
    metrics_tokens_file: str = setting(
        DEFAULT_METRICS_TOKENS_FILE,
        "--metrics-tokens",
        "FILE",
        "on --metrics-listen, answer only requests with a token of this file (in the format of --tokens): as Bearer, "
        "or as Basic with the name as user and the token as password",
    )
    metrics_hosts: str = setting(
        DEFAULT_METRICS_HOSTS,
        "--metrics-hosts",
        "NAMES",
        "further host names, separated by commas, that requests to --metrics-listen may use (.example.org: all below "
        "it; *: any name). IP addresses, localhost, names without a dot, this host's name and the host of "
        "--metrics-listen are always allowed",
    )

    @property
    def metrics_host_names(self) -> tuple[str, ...]:
        """The names in ``metrics_hosts``."""
        return tuple(name.strip().lower() for name in self.metrics_hosts.split(",") if name.strip())

    def _check_access(self) -> None:
        if bool(self.tls_cert_file) != bool(self.tls_key_file):
            missing = "tls_key_file" if self.tls_cert_file else "tls_cert_file"
            self._refuse(missing, "a file, as --tls-cert and --tls-key go together")
        for name in ("tls_client_ca_file", "metrics_tls"):
            if getattr(self, name) and not self.tls_cert_file:
                self._refuse(name, "--tls-cert and --tls-key beside it")
        for name in self.metrics_host_names:
            if name != ANY_HOST and not re.fullmatch(r"\.?[a-z0-9_-]+(\.[a-z0-9_-]+)*", name):
                self._refuse(
                    "metrics_hosts", "host names separated by commas, such as gpu7.example.org,.lab.example.org"
                )
