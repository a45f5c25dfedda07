"""What brings a call to the server, as the call sees it: gRPC, or the shared-memory socket."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NoReturn, Protocol

import grpc


class Carrier(Protocol):
    """A part of ``grpc.ServicerContext``, which is one."""

    def peer(self) -> str:
        """Where the caller is: ``ipv4:10.0.0.7:41234``, ``unix:``, or ``unix:uid=1000,pid=4711``."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]:
        """What came beside the message."""

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline; None if it has none."""

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Has it called if the call ends early: its caller cancels it or goes away, its deadline passes, or
        :meth:`cancel` is called. False if it has ended."""

    def is_active(self) -> bool:
        """False once it has ended."""

    def cancel(self) -> object:
        """Ends it."""

    def set_trailing_metadata(self, trailing_metadata: tuple[tuple[str, str], ...]) -> None:
        """What goes out beside an error."""

    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        """Ends it with an error, by raising."""
