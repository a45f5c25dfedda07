"""The options of a client: every one checked when they are built, and parsed from strings once."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from lovasz import wire
from lovasz.client.load_balancing import LoadBalancing
from lovasz.client.options import ClientOptions, Transport


def parsed(**changes: Any) -> ClientOptions:
    arguments = {"timeout": 2.5, "transport": "auto", "wire_dtype": None, "load_balancing": None, "run": None}
    return ClientOptions.parsed(**{**arguments, **changes})


def test_strings_become_what_they_name() -> None:
    assert parsed() == ClientOptions(2.5)
    options = parsed(transport="shm", wire_dtype="bfloat16", load_balancing="ring_hash", run="cityscapes")
    bfloat16 = wire.dtype_named("bfloat16")
    assert options == ClientOptions(2.5, Transport.SHM, bfloat16, LoadBalancing.RING_HASH, "cityscapes")
    assert pickle.loads(pickle.dumps(options)) == options


@pytest.mark.parametrize("name", ["auto", "grpc", "shm"])
def test_transports_keep_their_names(name: str) -> None:
    assert parsed(transport=name).transport.value == name


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"timeout": 0}, "timeout: got 0; expected seconds > 0"),
        ({"timeout": float("nan")}, "timeout: got nan; expected seconds > 0"),
        ({"transport": "tcp"}, "transport: got 'tcp'; expected one of auto, grpc, shm"),
        ({"transport": None}, "transport: got None; expected one of auto, grpc, shm"),
        ({"wire_dtype": "int64"}, "wire_dtype: got 'int64'; expected None or one of float32, float16, bfloat16"),
        ({"load_balancing": ""}, "load_balancing: got ''; expected None or one of round_robin, ring_hash"),
        ({"timeout": None}, "timeout: got None; expected seconds > 0"),
        ({"timeout": "60"}, "timeout: got '60'; expected seconds > 0"),
        ({"run": 3}, "run: got 3; expected a text"),
        ({"run": 0}, "run: got 0; expected a text"),
        ({"run": "x" * 201}, "run: got 201 characters; expected at most 200"),
        ({"http_proxy": "http://proxy:3128"}, "http_proxy: got 'http://proxy:3128'; expected True or False"),
        ({"http_proxy": None}, "http_proxy: got None; expected True or False"),
    ],
)
def test_an_invalid_option_is_named(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole text is compared.
        parsed(**changes)
    assert str(raised.value) == text


def test_options_built_directly_are_checked_too() -> None:
    with pytest.raises(ValueError, match="wire_dtype: got 'uint8'; expected None or one of float32, "):
        ClientOptions(wire_dtype=wire.dtype_named("uint8"))
    with pytest.raises(FrozenInstanceError):
        ClientOptions().run = "another"  # type: ignore[misc]


def test_a_timeout_is_one_that_grpc_accepts() -> None:
    assert ClientOptions(timeout=float("inf")).timeout == 1e8
