"""Decides from a request's header whether there is room for it, and holds that room until gRPC has its answer."""

from __future__ import annotations

import random
import threading
import time

from lovasz.server.config import format_bytes
from lovasz.server.errors import OverloadedError, StoppingError, TooLargeError

_MIN_RETRY_SECONDS = 0.05
_MAX_RETRY_SECONDS = 5.0


class Permit:
    """Room for one request; given back once, by :meth:`release` or at the end of a ``with``."""

    def __init__(self, admission: Admission, nbytes: int) -> None:
        self._admission = admission
        self._nbytes = nbytes
        self._since = time.monotonic()
        self._held = True

    def release(self) -> None:
        if self._held:
            self._held = False
            self._admission._give_back(self._nbytes, time.monotonic() - self._since)

    def __enter__(self) -> Permit:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Admission:
    """Counts the requests in flight and their tensor bytes against a budget."""

    def __init__(self, budget_bytes: int, max_requests: int) -> None:
        self.budget_bytes = budget_bytes
        self.max_requests = max_requests
        self._changed = threading.Condition()
        self._bytes = 0
        self._requests = 0
        self._open = True
        self._mean_held_seconds = 0.1

    @property
    def bytes_in_flight(self) -> int:
        return self._bytes

    @property
    def requests_in_flight(self) -> int:
        return self._requests

    def reserve(self, nbytes: int) -> Permit:
        """Takes room for a request's tensors.

        Raises:
            TooLargeError: more than the whole budget.
            OverloadedError: no room at the moment; says when to try again.
            StoppingError: the server is draining.
        """
        if nbytes > self.budget_bytes:
            raise TooLargeError(
                f"the request's tensors take {format_bytes(nbytes)} with their gradient; the server's whole budget is "
                f"{format_bytes(self.budget_bytes)} (--memory-budget)"
            )
        with self._changed:
            if not self._open:
                raise StoppingError("the server is stopping and takes no new requests")
            if self._requests >= self.max_requests:
                raise self._overloaded(f"{self._requests} requests are in flight, as many as may be (--max-requests)")
            if self._bytes + nbytes > self.budget_bytes:
                raise self._overloaded(
                    f"the request needs {format_bytes(nbytes)}; {format_bytes(self._bytes)} of "
                    f"{format_bytes(self.budget_bytes)} are in use (--memory-budget)"
                )
            self._bytes += nbytes
            self._requests += 1
        return Permit(self, nbytes)

    def close(self) -> None:
        """Admits nothing from now on."""
        with self._changed:
            self._open = False

    def wait_until_empty(self, timeout_seconds: float) -> int:
        """Waits for all that was admitted to be given back; returns how many requests were not."""
        with self._changed:
            self._changed.wait_for(lambda: self._requests == 0, timeout_seconds)
            return self._requests

    def _overloaded(self, text: str) -> OverloadedError:
        # About the time for which room is held, spread, so that those refused together do not come back together.
        delay = self._mean_held_seconds * random.uniform(0.5, 1.5)
        return OverloadedError(text, min(max(delay, _MIN_RETRY_SECONDS), _MAX_RETRY_SECONDS))

    def _give_back(self, nbytes: int, held_seconds: float) -> None:
        with self._changed:
            self._bytes -= nbytes
            self._requests -= 1
            self._changed.notify_all()
            self._mean_held_seconds += 0.1 * (held_seconds - self._mean_held_seconds)
