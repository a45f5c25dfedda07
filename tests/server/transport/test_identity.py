"""Who a caller is."""

from __future__ import annotations

from lovasz.server.transport.identity import Identity


def test_ports_tell_connections_apart_and_not_owners() -> None:
    first, second = Identity("", "ipv4:10.0.0.7:41234"), Identity("", "ipv4:10.0.0.7:41235")
    assert first.connection != second.connection
    assert first.owner == second.owner == "ipv4:10.0.0.7"
    assert Identity("", "ipv6:%5B::1%5D:41234").owner == "ipv6:%5B::1%5D"


def test_a_name_owns_from_any_host() -> None:
    first, second = Identity("vision", "ipv4:10.0.0.7:41234"), Identity("vision", "ipv4:10.0.0.8:41234")
    assert first.owner == second.owner == "vision"
    assert first.fields == {"peer": "ipv4:10.0.0.7:41234", "caller": "vision"}


def test_unix_sockets_tell_nobody_apart() -> None:
    caller = Identity("", "unix:")
    assert (caller.connection, caller.owner, caller.fields) == ("", "unix:", {"peer": "unix:"})
