"""Who may ask the HTTP server: the names in Host, and the tokens in Authorization."""

from __future__ import annotations

import base64
import socket
from pathlib import Path

import pytest

from lovasz.server.access.tokens import Tokens
from lovasz.server.web.guard import Guard

TOKEN = "t" * 20


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("host", "passes"),
    [
        ("127.0.0.1:9095", True),
        ("[::1]:9095", True),
        ("[fe80::1%eth0]:9095", True),
        ("10.1.2.3", True),
        ("localhost:9095", True),
        ("app.localhost", True),
        ("server:9095", True),
        ("LOCALHOST.:9095", True),
        (f"{socket.gethostname()}:9095", True),
        ("gpu7.example.org:9095", True),
        ("GPU7.Example.Org", True),
        ("a.b.lab.example.org", True),
        ("lab.example.org", False),
        ("evil-lab.example.org", False),
        ("rebound.example.com:9095", False),
        ("127.0.0.1.example.com", False),
        ("localhost.example.com", False),
        ("rebound.example.com,localhost", False),
        ("rebound@server", False),
        ("", False),
    ],
)
def test_a_foreign_name_in_host_is_refused(host: str, passes: bool) -> None:
    guard = Guard(("gpu7.example.org", ".lab.example.org"), None)
    refusal = guard.refusal({"HTTP_HOST": host})
    assert (refusal is None) is passes
    if refusal is not None:
        assert refusal.status == "403 Forbidden"
        assert ascii(host) in refusal.text
        assert "--metrics-hosts" in refusal.text


def test_any_name_may_be_allowed_and_none_is_needed() -> None:
    assert Guard(("*",), None).refusal({"HTTP_HOST": "rebound.example.com"}) is None
    assert Guard((), None).refusal({}) is None  # HTTP/1.0, which no browser speaks.


@pytest.mark.parametrize(
    ("authorization", "passes"),
    [
        (f"Bearer {TOKEN}", True),
        (basic(f"prometheus:{TOKEN}"), True),
        (basic(f"other:{TOKEN}"), False),
        (basic(TOKEN), False),
        ("Basic ???", False),
        ("Basic " + base64.b64encode(b"\xff:\xff").decode(), False),
        ("Bearer wrong", False),
        (f"Digest {TOKEN}", False),
        ("", False),
    ],
)
def test_a_token_comes_as_bearer_or_as_basic(tmp_path: Path, authorization: str, passes: bool) -> None:
    (tmp_path / "tokens").write_text(f"prometheus:{TOKEN}\n")
    guard = Guard((), Tokens("--metrics-tokens", str(tmp_path / "tokens")))
    refusal = guard.refusal({"HTTP_HOST": "server", "HTTP_AUTHORIZATION": authorization})
    assert (refusal is None) is passes
    if refusal is not None:
        assert refusal.status == "401 Unauthorized"
        assert [value.partition(" ")[0] for _, value in refusal.headers] == ["Basic", "Bearer"]


def test_names_are_shown_to_who_has_a_token_where_there_are_tokens(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(f"alice:{TOKEN}\n")
    tokens = Tokens("--tokens", str(tmp_path / "tokens"))
    for guard in (Guard((), None), Guard((), tokens), Guard((), tokens, tokens)):
        assert guard.shows_names({})
    guard = Guard((), None, tokens)
    for authorization in (f"Bearer {TOKEN}", basic(f"alice:{TOKEN}")):
        assert guard.shows_names({"HTTP_AUTHORIZATION": authorization})
    for authorization in ("", "Bearer " + "x" * 20, basic(f"bob:{TOKEN}")):
        assert not guard.shows_names({"HTTP_AUTHORIZATION": authorization})
    assert guard.refusal({}) is None
