"""Decides from a request's header whether it fits into the budget, and holds its bytes until gRPC has its answer."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from lovasz.server.errors import (
    DeviceError,
    NoBytesLeftError,
    NoRequestsLeftError,
    ServerError,
    StartingError,
    StoppingError,
    TooLargeError,
)
from lovasz.server.settings import format_bytes

_MIN_RETRY_SECONDS = 0.05
_MAX_RETRY_SECONDS = 5.0


class Permit:
    """Room for requests. Given back once, by :meth:`release` or at the end of a ``with``."""

    def __init__(self, admission: Admission, nbytes: int, requests: int) -> None:
        self._admission = admission
        self._nbytes = nbytes
        self._requests = requests
        self._since = time.monotonic()

    def release(self) -> None:
        nbytes, requests = self._nbytes, self._requests
        if nbytes or requests:
            self._hold(0, 0)
            self._admission._give_back(nbytes, requests, time.monotonic() - self._since)

    def release_request(self) -> None:
        """Gives the request's slot back and keeps its bytes."""
        requests = self._requests
        self._hold(self._nbytes, 0)
        self._admission._give_back(0, requests, time.monotonic() - self._since)

    def split(self, nbytes: int) -> Permit:
        """Takes the room for one request, of this many bytes, out of this permit."""
        assert nbytes <= self._nbytes
        assert self._requests >= 1
        self._hold(self._nbytes - nbytes, self._requests - 1)
        return Permit(self._admission, nbytes, 1)

    def absorb(self, other: Permit) -> None:
        """Takes over the room of another permit."""
        self._hold(self._nbytes + other._nbytes, self._requests + other._requests)
        other._hold(0, 0)

    def resize(self, nbytes: int) -> None:
        """Reserves more bytes, or gives some back, until the permit has this many.

        Raises:
            OverloadedError: there is no room for more at the moment.
        """
        if nbytes > self._nbytes:
            self._admission._take(nbytes - self._nbytes, 0)
        elif nbytes < self._nbytes:
            self._admission._give_back(self._nbytes - nbytes, 0, 0.0)
        self._hold(nbytes, self._requests)

    def _hold(self, nbytes: int, requests: int) -> None:
        self._nbytes, self._requests = nbytes, requests

    def __enter__(self) -> Permit:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Admission:
    """Counts the requests in flight and their tensor bytes against a budget.

    Attributes:
        starting: whether the device is not ready yet: nothing is admitted until it is.
        failing: whether the device does not answer: nothing is admitted while it does not.
    """

    def __init__(self, budget_bytes: int, max_requests: int) -> None:
        self.budget_bytes = budget_bytes
        self.max_requests = max_requests
        self._changed = threading.Condition()
        self._bytes = 0
        self._requests = 0
        self._open = True
        self.starting = False
        self.failing = False
        self._peak_bytes = 0
        self._mean_held_seconds = 0.1
        self.reclaim: Callable[[], bool] = lambda: False
        """Gives up bytes that are not needed but only useful; says whether there were any. Called when only bytes are
        missing."""

    @property
    def bytes_in_flight(self) -> int:
        return self._bytes

    @property
    def requests_in_flight(self) -> int:
        return self._requests

    def take_peak_bytes(self) -> int:
        """The most bytes that were in flight at a time since the last call."""
        with self._changed:
            peak, self._peak_bytes = self._peak_bytes, self._bytes
            return peak

    def reserve(self, nbytes: int, requests: int = 1) -> Permit:
        """Takes room for the tensors of a request, or of several.

        Raises:
            TooLargeError: they need more than the whole budget.
            OverloadedError: there is no room at the moment; says when to try again.
            StartingError: the device is not ready yet.
            DeviceError: the device does not answer.
            StoppingError: the server is draining.
        """
        self.check_size(nbytes, requests)
        self._take(nbytes, requests)
        return Permit(self, nbytes, requests)

    def check_size(self, nbytes: int, requests: int) -> None:
        """Whether so much fits into the whole budget.

        Raises:
            TooLargeError: it does not.
        """
        subject = "the request" if requests == 1 else f"the {requests} requests"
        if nbytes > self.budget_bytes:
            raise TooLargeError(
                f"the tensors of {subject} take {format_bytes(nbytes)} with their gradient; the server's whole budget "
                f"is {format_bytes(self.budget_bytes)} (--memory-budget)"
            )
        if requests > self.max_requests:
            raise TooLargeError(
                f"{requests} requests are to be held together; the server holds {self.max_requests} at most "
                "(--max-requests)"
            )

    def close(self) -> None:
        """Admits nothing from now on."""
        with self._changed:
            self._open = False

    def wait_until_empty(self, timeout_seconds: float) -> int:
        """Waits until all requests have given their room back; returns how many have not in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._requests == 0, timeout_seconds)
            return self._requests

    def _take(self, nbytes: int, requests: int) -> None:
        while True:
            with self._changed:
                refusal = self._refusal(nbytes, requests)
                if refusal is None:
                    self._bytes += nbytes
                    self._peak_bytes = max(self._peak_bytes, self._bytes)
                    self._requests += requests
                    return
                lacks_only_bytes = self._refusal(0, requests) is None
            if not (lacks_only_bytes and self.reclaim()):
                raise refusal

    def _refusal(self, nbytes: int, requests: int) -> ServerError | None:
        if not self._open and requests:
            return StoppingError("the server is stopping and takes no new requests")
        if self.starting:
            return StartingError("the server is starting: it compiles, up to a minute the first time")
        if self.failing and requests:
            return DeviceError("the server's device does not answer; try another server")
        if self._requests + requests > self.max_requests:
            return NoRequestsLeftError(
                f"{self._requests} requests are in flight, of at most {self.max_requests} (--max-requests), and "
                f"{requests} would come on top",
                self._retry_seconds(),
            )
        if self._bytes + nbytes > self.budget_bytes:
            return NoBytesLeftError(
                f"{format_bytes(nbytes)} are needed; {format_bytes(self._bytes)} of "
                f"{format_bytes(self.budget_bytes)} are in use (--memory-budget)",
                self._retry_seconds(),
            )
        return None

    def _retry_seconds(self) -> float:
        """About as long as room is held; random, so that callers refused together do not come back together."""
        delay = self._mean_held_seconds * random.uniform(0.5, 1.5)
        return min(max(delay, _MIN_RETRY_SECONDS), _MAX_RETRY_SECONDS)

    def _give_back(self, nbytes: int, requests: int, held_seconds: float) -> None:
        with self._changed:
            self._bytes -= nbytes
            self._requests -= requests
            self._changed.notify_all()
            if requests:
                self._mean_held_seconds += 0.1 * (held_seconds - self._mean_held_seconds)
