"""Who a caller is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import pytest

from lovasz import wire
from lovasz.server.schedule.job import CONNECTION, Tenant
from lovasz.server.transport.carrier import Carrier
from lovasz.server.transport.identity import Identity
from lovasz.spec import LovaszSoftmax, weighted_sum

NOBODY, VISION, SPEECH = (Identity(name, "ipv4:10.0.0.7:41234") for name in ("", "vision", "speech"))
RANK = wire.Joint("run", 0, 0, 2)
REQUEST = wire.Request.checked(
    weighted_sum(LovaszSoftmax()),
    wire.TensorSpec(wire.dtype_named("float32"), (1, 3, 10)),
    wire.TensorSpec(wire.dtype_named("uint8"), (1, 10)),
    True,
)
SECRET = replace(RANK, secret=b"0123456789abcdef")


def test_the_log_names_who_has_a_name() -> None:
    assert NOBODY.fields == {"peer": "ipv4:10.0.0.7:41234"}
    assert VISION.fields == {"peer": "ipv4:10.0.0.7:41234", "caller": "vision"}


@dataclass
class Caller:
    """A carrier, as far as an identity needs it."""

    address: str
    metadata: tuple[tuple[str, str | bytes], ...] = ()

    def peer(self) -> str:
        return self.address

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self.metadata


def identity(address: str, *metadata: tuple[str, str | bytes]) -> Identity:
    return Identity.of(cast(Carrier, Caller(address, metadata)))


def test_clients_on_a_unix_socket_say_who_they_are() -> None:
    one, other = (identity("unix:", ("x", "y"), (wire.CLIENT_KEY, digit * 16)) for digit in "ab")
    assert one.connection == "unix:client=" + "a" * 16 != other.connection
    request = replace(REQUEST, run="digits")
    assert one.tenant(request) == Tenant(CONNECTION, one.address) != other.tenant(request)
    assert one.tenant(request).label == "host unix"


def test_processes_on_the_socket_of_shared_memory_are_told_apart() -> None:
    one, other = (identity(f"unix:uid=1000,pid={process}", (wire.CLIENT_KEY, "a" * 16)) for process in (7, 8))
    assert one.connection == "unix:uid=1000,pid=7" != other.connection


@pytest.mark.parametrize("said", ["", "short", "A" * 16, "a" * 33, "uid=1,pid=1234", b"a" * 16])
def test_who_does_not_say_so_on_a_unix_socket_is_told_apart_from_nobody(said: str | bytes) -> None:
    caller = identity("unix:", (wire.CLIENT_KEY, said))
    assert (caller.connection, caller.fields) == ("", {"peer": "unix:"})


def test_on_a_network_nobody_says_who_he_is() -> None:
    assert identity("ipv4:10.0.0.7:41234", (wire.CLIENT_KEY, "a" * 16)).connection == "ipv4:10.0.0.7:41234"


def test_a_run_belongs_to_who_knows_its_secret_else_to_a_name_else_to_nobody() -> None:
    key = b"key"
    assert NOBODY.sealed(SECRET, key) == VISION.sealed(SECRET, key) != NOBODY.sealed(RANK, key)
    assert VISION.sealed(RANK, key) != SPEECH.sealed(RANK, key)
    assert not NOBODY.sealed(RANK, key).secret
    assert NOBODY.sealed(replace(RANK, secret=VISION.sealed(RANK, key).secret), key) != VISION.sealed(RANK, key)


def test_what_stands_for_a_secret_tells_nothing_about_it() -> None:
    assert NOBODY.sealed(SECRET, b"key").secret not in (SECRET.secret, NOBODY.sealed(SECRET, b"another").secret)
