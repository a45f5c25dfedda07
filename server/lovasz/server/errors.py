"""What can go wrong with a request besides its content; ``service`` holds the table that maps these to gRPC codes."""

from __future__ import annotations

from typing import TypeVar

ErrorT = TypeVar("ErrorT", bound=BaseException)


def fresh(error: ErrorT) -> ErrorT:
    """A copy to raise. One object that is raised in several threads would gather the frames of all of them, and lead in
    circles where one of these holds what the error came from."""
    copied = type(error).__new__(type(error), *error.args)
    copied.args = error.args
    copied.__dict__.update(error.__dict__)
    copied.__cause__ = error.__cause__
    return copied.with_traceback(error.__traceback__)


class ServerError(Exception):
    """A request that cannot be answered. The text goes to the caller."""


class OverloadedError(ServerError):
    """The server is full at the moment.

    Attributes:
        lacks: ``"bytes"`` or ``"requests"``.
    """

    def __init__(self, text: str, retry_after_seconds: float, lacks: str = "bytes") -> None:
        super().__init__(text)
        self.retry_after_seconds = retry_after_seconds
        self.lacks = lacks


class TooLargeError(ServerError):
    """The request cannot fit here, however long its caller waits."""


class StoppingError(ServerError):
    """The server takes no new requests."""


class DeviceError(ServerError):
    """The device did not compute."""


class ExpiredError(ServerError):
    """The caller's deadline passed before the request was computed."""


class AbandonedError(ServerError):
    """The caller went away."""


class StalledError(ServerError):
    """The caller stopped sending its request."""


class JointMismatchError(ServerError):
    """The request does not fit those of the other ranks of its step."""


class JointBrokenError(ServerError):
    """The step cannot be completed: a rank is missing, or cannot be computed with. It can be tried again."""


class SessionLostError(ServerError):
    """The request's shared memory belongs to a session that is not there."""
