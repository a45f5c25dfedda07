"""What can go wrong with a request, apart from its content.

``InvalidInput`` (``lovasz.spec``) is the error for invalid content. ``transport.status`` says how each error leaves the
server.
"""

from __future__ import annotations

from typing import TypeVar

ErrorT = TypeVar("ErrorT", bound=BaseException)

NEVER = -1.0
"""As a delay before a retry: the request should not be sent again."""


def fresh(error: ErrorT) -> ErrorT:
    """Copies an error, so that several threads can raise it.

    One object raised in several threads would collect the frames of all of them, and would form a reference cycle where
    one of these frames holds what the error came from.
    """
    copied = type(error).__new__(type(error), *error.args)
    copied.args = error.args
    copied.__dict__.update(error.__dict__)
    copied.__cause__ = error.__cause__
    return copied.with_traceback(error.__traceback__)


class ServerError(Exception):
    """A request that cannot be answered. The text goes to the caller.

    Attributes:
        retry_after_seconds: the delay after which the caller should try again; None if the server does not say.
        was_sent: whether the call was ended with it already, from outside its thread.
    """

    retry_after_seconds: float | None = None
    was_sent = False

    @property
    def retry_after_milliseconds(self) -> int | None:
        """The same as it is sent. gRPC's own retries wait for this long; if it is negative, they do not try again."""
        return None if self.retry_after_seconds is None else round(self.retry_after_seconds * 1000)


class OverloadedError(ServerError):
    """The server is full at the moment. Raised as one of its subclasses, which say what the server lacks."""

    retry_after_seconds: float

    def __init__(self, text: str, retry_after_seconds: float) -> None:
        super().__init__(text)
        self.retry_after_seconds = retry_after_seconds


class NoBytesLeftError(OverloadedError):
    """There is no memory left for the request's tensors."""


class NoRequestsLeftError(OverloadedError):
    """As many requests are in flight as the server holds at most."""


class NameLimitError(OverloadedError):
    """The requests of the caller's name hold all that they may."""


class TooLargeError(ServerError):
    """The request can never fit here, however long its caller waits."""

    retry_after_seconds = NEVER


class UnauthenticatedError(ServerError):
    """The call has no token, or one that the server does not know."""


class StartingError(ServerError):
    """The server's device is not ready yet."""

    retry_after_seconds = 1.0


class StoppingError(ServerError):
    """The server takes no new requests."""

    def __init__(self, text: str = "the server is stopping and accepts no new requests") -> None:
        super().__init__(text)


class DeviceError(ServerError):
    """The device did not compute."""


class ExpiredError(ServerError):
    """The caller's deadline passed before the request was answered."""


class AbandonedError(ServerError):
    """The caller went away, or the same call came again."""

    def __init__(self, text: str = "the caller went away") -> None:
        super().__init__(text)


class StalledError(ServerError):
    """The caller stopped sending its request."""

    @classmethod
    def of(cls, what: str, seconds: float, option: str) -> StalledError:
        """Something did not come in time.

        Args:
            what: what had to come: a header, or a message.
            option: what sets the time; empty: no option does.
        """
        return cls(f"no {what} arrived within {seconds:g} s" + (f" ({option})" if option else ""))


class JointMismatchError(ServerError):
    """The request does not fit those of the other ranks of its step."""


class RunConflictError(ServerError):
    """Another training has a run of the same name: the caller has to use another name, or the run's secret."""


class JointBrokenError(ServerError):
    """The step cannot be completed: a rank is missing, or its request is invalid. The step can be tried again."""


class RegroupError(ServerError):
    """Ranks of a step wait that should call again: with several servers, the missing ones may have reached another."""

    retry_after_seconds = 0.1


class SessionLostError(ServerError):
    """The request's shared memory belongs to a session that has ended, or to another server."""
