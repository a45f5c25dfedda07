"""Who a caller is."""

from __future__ import annotations

from dataclasses import replace

from lovasz import wire
from lovasz.server.transport.identity import Identity

NOBODY, VISION, SPEECH = (Identity(name, "ipv4:10.0.0.7:41234") for name in ("", "vision", "speech"))
RANK = wire.Joint("run", 0, 0, 2)
SECRET = replace(RANK, secret=b"0123456789abcdef")


def test_the_log_names_who_has_a_name() -> None:
    assert NOBODY.fields == {"peer": "ipv4:10.0.0.7:41234"}
    assert VISION.fields == {"peer": "ipv4:10.0.0.7:41234", "caller": "vision"}


def test_unix_sockets_tell_nobody_apart() -> None:
    caller = Identity("", "unix:")
    assert (caller.connection, caller.fields) == ("", {"peer": "unix:"})


def test_a_run_belongs_to_who_knows_its_secret_else_to_a_name_else_to_nobody() -> None:
    key = b"key"
    assert NOBODY.sealed(SECRET, key) == VISION.sealed(SECRET, key) != NOBODY.sealed(RANK, key)
    assert VISION.sealed(RANK, key) != SPEECH.sealed(RANK, key)
    assert not NOBODY.sealed(RANK, key).secret
    assert NOBODY.sealed(replace(RANK, secret=VISION.sealed(RANK, key).secret), key) != VISION.sealed(RANK, key)


def test_what_stands_for_a_secret_tells_nothing_about_it() -> None:
    assert NOBODY.sealed(SECRET, b"key").secret not in (SECRET.secret, NOBODY.sealed(SECRET, b"another").secret)
