"""Fields that a newer version of the contract has, and this one has not."""

from __future__ import annotations

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from lovasz.spec import InvalidInput


def check_known(name: str, message: Message) -> None:
    """Checks that a message has no field that this version does not know: it may change what the request means.

    Args:
        name: of the message, for the error.

    Raises:
        InvalidInput: it has one.
    """
    unknown = UnknownFieldSet(message)
    if len(unknown) > 0:
        raise InvalidInput(
            name,
            f"got field number {unknown[0].field_number}, which this version does not know; expected fields of "
            "lovasz.v1 as it was when this server was built: update the server, or do without what is new",
        )
