"""The wire contract in Python: element types, request and answer headers, and tensors as bytes.

Needs numpy and protobuf only. Client and server use the same code, so each rule is written once. How a message with
tensors is serialized is in :mod:`lovasz.wire.framing`.
"""

from lovasz.wire.block import ALIGNMENT, Places, SharedTensors, check_inside
from lovasz.wire.connection import CLIENT_KEY, KEEPALIVE_OPTIONS, PUSHBACK_KEY
from lovasz.wire.dtypes import DTYPES, FLOATS, INTEGERS, DType, dtype_named
from lovasz.wire.joint import (
    MAX_CALL_BYTES,
    MAX_RUN_CHARACTERS,
    MAX_WORLD_SIZE,
    Abort,
    Joint,
    Leave,
)
from lovasz.wire.losses import loss_from_proto, loss_to_proto
from lovasz.wire.messages import IMAGE_SEGMENTS, Request, Response, TensorSpec
from lovasz.wire.payload import CHUNK_BYTES, MAX_FRAME_BYTES, MAX_MESSAGE_BYTES, Assembly, as_bytes, chunks
from lovasz.wire.sockets import (
    CAN_SHARE_MEMORY,
    MAX_PACKET_BYTES,
    MAX_REGIONS,
    MAX_SOCKET_PATH_BYTES,
    MEMORY_SUFFIX,
    UNIX,
    lacks_slash,
    peer_of,
    socket_path,
)

__all__ = [
    "ALIGNMENT",
    "CAN_SHARE_MEMORY",
    "CHUNK_BYTES",
    "DTYPES",
    "FLOATS",
    "IMAGE_SEGMENTS",
    "INTEGERS",
    "MAX_CALL_BYTES",
    "MAX_FRAME_BYTES",
    "MAX_MESSAGE_BYTES",
    "MAX_PACKET_BYTES",
    "MAX_REGIONS",
    "MAX_RUN_CHARACTERS",
    "MAX_WORLD_SIZE",
    "CLIENT_KEY",
    "KEEPALIVE_OPTIONS",
    "MAX_SOCKET_PATH_BYTES",
    "MEMORY_SUFFIX",
    "PUSHBACK_KEY",
    "UNIX",
    "Abort",
    "Assembly",
    "DType",
    "Joint",
    "Leave",
    "Places",
    "Request",
    "Response",
    "SharedTensors",
    "TensorSpec",
    "as_bytes",
    "check_inside",
    "chunks",
    "dtype_named",
    "lacks_slash",
    "loss_from_proto",
    "loss_to_proto",
    "peer_of",
    "socket_path",
]
