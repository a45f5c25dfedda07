"""The options of the command ``lovasz`` for TLS and tokens, and the variables that stand for them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from lovasz.client.access import TLS, Access

TOKEN_VARIABLE = "LOVASZ_TOKEN"
"""The token itself. No option takes it: others on the host can read a command line."""

_FILES = {
    "tls_ca": "the CAs (PEM), one of which has signed the server's certificate",
    "tls_client_cert": "this client's certificate (PEM), if the server asks for one",
    "tls_client_key": "its private key (PEM)",
    "token_file": "a file that contains only the token",
}
_VARIABLES = {name: f"LOVASZ_{name.upper()}" for name in (*_FILES, "tls_server_name")}
VARIABLES = (TOKEN_VARIABLE, *_VARIABLES.values())


def add_access_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    group = parser.add_argument_group(
        "TLS and tokens", f"Environment variables can set these options; {TOKEN_VARIABLE} holds the token itself."
    )
    group.add_argument("--tls", action="store_true", help="TLS with the public CAs; --tls-ca implies TLS")
    for name, text in _FILES.items():
        group.add_argument(_flag(name), metavar="FILE", help=f"{text} ({_VARIABLES[name]})")
    group.add_argument(
        "--tls-server-name",
        metavar="NAME",
        help=f"the host name in the server's certificate, if it is not TARGET's ({_VARIABLES['tls_server_name']})",
    )
    group.add_argument(
        "--allow-token-without-tls", action="store_true", help="send the token to another host in plain text"
    )


def access_of(parsed: argparse.Namespace, environment: Mapping[str, str]) -> Access:
    """What the options say, and the variables where options are not given.

    Raises:
        ValueError: they do not go together.
    """
    given = {name: getattr(parsed, name) or environment.get(variable) for name, variable in _VARIABLES.items()}
    tls = None
    if parsed.tls or any(value for name, value in given.items() if name.startswith("tls_")):
        tls = TLS(
            given["tls_ca"] or None,
            given["tls_client_cert"] or None,
            given["tls_client_key"] or None,
            given["tls_server_name"] or None,
        )
    token_file = given["token_file"] or None
    token = None if parsed.token_file else environment.get(TOKEN_VARIABLE) or None
    return Access.parsed(tls, token, None if token else token_file, parsed.allow_token_without_tls)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
