"""The names of protobuf enum values, for error texts."""

from __future__ import annotations

from lovasz.v1 import loss_pb2 as pb


def enum_text(enum: type[pb.DataType] | type[pb.ClassSelection] | type[pb.InputKind], number: int) -> str:
    """The value's name; the number itself if this version has no name for it."""
    return enum.Name(number) if number in enum.values() else str(number)
