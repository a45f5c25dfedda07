"""Load balancing: which of several servers a call goes to. gRPC carries it out, following its service config."""

from __future__ import annotations

import json
from enum import Enum

import grpc

RUN_KEY = "lovasz-run"
"""Metadata key of joint calls: their run, percent-encoded. All calls of a run must reach one server."""


class LoadBalancing(Enum):
    """Which address of a target a call goes to; without one of these: the first address that answers."""

    ROUND_ROBIN = "round_robin"
    """Each address in turn."""
    RING_HASH = "ring_hash"
    """The address that the call's run hashes to."""


_POLICIES: dict[LoadBalancing, dict[str, dict[str, str]]] = {
    LoadBalancing.ROUND_ROBIN: {"round_robin": {}},
    LoadBalancing.RING_HASH: {"ring_hash_experimental": {"requestHashHeader": RUN_KEY}},
}

HASH_PROBLEM = (
    "got 'ring_hash', which gRPC does not carry out here; expected the environment variable "
    "GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY=true, set before the client is opened, and grpcio 1.70 or newer "
    f"(it is {grpc.__version__})"
)
_NO_HASH = "hash attribute not present"
"""gRPC's text, with INTERNAL, for every call of a channel that shall hash but does not know what."""


def service_config(load_balancing: LoadBalancing | None) -> str:
    """The service config, as JSON, that makes gRPC balance like this."""
    return json.dumps({} if load_balancing is None else {"loadBalancingConfig": [_POLICIES[load_balancing]]})


def cannot_hash(error: grpc.RpcError) -> bool:
    """Whether a call failed because gRPC does not support ``RING_HASH`` here; HASH_PROBLEM then says what to do."""
    return error.code() is grpc.StatusCode.INTERNAL and _NO_HASH in (error.details() or "")
