"""Decides from a request's header whether it fits into the budget, and holds its bytes until gRPC has its answer."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable

from lovasz.server.errors import (
    DeviceError,
    NameLimitError,
    NoBytesLeftError,
    NoRequestsLeftError,
    ServerError,
    StartingError,
    StoppingError,
    TooLargeError,
)
from lovasz.server.schedule.earmark import Earmark
from lovasz.server.settings import format_bytes

_MIN_RETRY_SECONDS = 0.05
_MAX_RETRY_SECONDS = 5.0


class Permit:
    """Room for requests. Given back once, by :meth:`release` or at the end of a ``with``.

    Attributes:
        name: whose share of the room it counts for: the name of a token; empty: nobody's.
    """

    def __init__(self, admission: Admission, nbytes: int, requests: int, name: str) -> None:
        self._admission = admission
        self.name = name
        self._nbytes = nbytes
        self._requests = requests
        self._since = time.monotonic()

    def release(self) -> None:
        nbytes, requests = self._nbytes, self._requests
        if nbytes or requests:
            self._hold(0, 0)
            self._admission._give_back(nbytes, requests, self.name, time.monotonic() - self._since)

    def release_request(self) -> None:
        """Gives the request's slot back and keeps its bytes."""
        requests = self._requests
        self._hold(self._nbytes, 0)
        self._admission._give_back(0, requests, self.name, time.monotonic() - self._since)

    def split(self, nbytes: int) -> Permit:
        """Takes the room for one request, of this many bytes, out of this permit."""
        assert nbytes <= self._nbytes
        assert self._requests >= 1
        self._hold(self._nbytes - nbytes, self._requests - 1)
        return Permit(self._admission, nbytes, 1, self.name)

    def absorb(self, other: Permit) -> None:
        """Takes over the room of another permit of the same name."""
        assert other.name == self.name
        self._hold(self._nbytes + other._nbytes, self._requests + other._requests)
        other._hold(0, 0)

    def resize(self, nbytes: int) -> None:
        """Reserves more bytes, or gives some back, until the permit has this many.

        Raises:
            OverloadedError: there is no room for more at the moment.
        """
        if nbytes > self._nbytes:
            self._admission._take(nbytes - self._nbytes, 0, self.name)
        elif nbytes < self._nbytes:
            self._admission._give_back(self._nbytes - nbytes, 0, self.name, 0.0)
        self._hold(nbytes, self._requests)

    def _hold(self, nbytes: int, requests: int) -> None:
        self._nbytes, self._requests = nbytes, requests

    def __enter__(self) -> Permit:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Admission:
    """Counts the requests in flight and their tensor bytes against a budget, of which each name has a share.

    Attributes:
        starting: whether the device is not ready yet: nothing is admitted until it is.
        failing: whether the device does not answer: nothing is admitted while it does not.
    """

    def __init__(
        self, budget_bytes: int, max_requests: int, share_of: Callable[[str], float] = lambda name: 1.0
    ) -> None:
        """Nothing is in flight.

        Args:
            share_of: the share of all room that the requests of a name may hold at a time, in (0, 1].
        """
        self.budget_bytes = budget_bytes
        self._share_of = share_of
        self._bytes_of: Counter[str] = Counter()
        self._requests_of: Counter[str] = Counter()
        self.max_requests = max_requests
        self._lock = threading.RLock()
        self._empty = threading.Condition(self._lock)
        self._is_awaited = False
        """Whether somebody waits until it is empty."""
        self._bytes = 0
        self._requests = 0
        self._open = True
        self.starting = False
        self.failing = False
        self._peak_bytes = 0
        self._mean_held_seconds = 0.1
        self._earmark = Earmark()
        self.reclaim: Callable[[str | None], bool] = lambda name: False
        """Gives up bytes that are not needed but only useful, those of a name or of all; says whether there were any.
        Called when only bytes are missing."""

    @property
    def bytes_in_flight(self) -> int:
        return self._bytes

    @property
    def requests_in_flight(self) -> int:
        return self._requests

    def take_peak_bytes(self) -> int:
        """The most bytes that were in flight at a time since the last call."""
        with self._lock:
            peak, self._peak_bytes = self._peak_bytes, self._bytes
            return peak

    def reserve(self, nbytes: int, requests: int = 1, name: str = "", who: str = "") -> Permit:
        """Takes room for the tensors of a request, or of several.

        Args:
            name: whose share they count for: the name of a token; empty: nobody's.
            who: who asks, and asks again with the same size if there is no room: then bytes are kept for it after some
                seconds (``Earmark``). Empty: that is not known. Such requests leave nothing to others, either.

        Raises:
            TooLargeError: they need more than the whole budget, or the whole share of the name.
            OverloadedError: there is no room at the moment; says when to try again.
            StartingError: the device is not ready yet.
            DeviceError: the device does not answer.
            StoppingError: the server is draining.
        """
        self.check_size(nbytes, requests, name)
        self._take(nbytes, requests, name, who)
        return Permit(self, nbytes, requests, name)

    def most_bytes(self, name: str) -> int:
        """The most bytes that the requests of a name may hold at a time."""
        return int(self._share_of(name) * self.budget_bytes) if name else self.budget_bytes

    def most_requests(self, name: str) -> int:
        """The most requests of a name at a time."""
        return max(1, int(self._share_of(name) * self.max_requests)) if name else self.max_requests

    def check_size(self, nbytes: int, requests: int, name: str) -> None:
        """Whether so much fits into the whole budget, and into the share of a name.

        Raises:
            TooLargeError: it does not.
        """
        # A share is at most the whole.
        if nbytes > self.most_bytes(name) or requests > self.most_requests(name):
            raise self._too_large(nbytes, requests, name)

    def _too_large(self, nbytes: int, requests: int, name: str) -> TooLargeError:
        subject = "the request" if requests == 1 else f"the {requests} requests"
        if nbytes > self.budget_bytes:
            return TooLargeError(
                f"the tensors of {subject} take {format_bytes(nbytes)} with their gradient; the server's whole budget "
                f"is {format_bytes(self.budget_bytes)} (--memory-budget)"
            )
        if requests > self.max_requests:
            return TooLargeError(
                f"{requests} requests are needed together; the server holds {self.max_requests} at most "
                "(--max-requests)"
            )
        if nbytes > self.most_bytes(name):
            return TooLargeError(
                f"the tensors of {subject} take {format_bytes(nbytes)} with their gradient; the requests of {name} may "
                f"hold {format_bytes(self.most_bytes(name))} at a time ({self._limit(name)} of --memory-budget)"
            )
        return TooLargeError(
            f"{requests} requests are needed together; {name} may have {self.most_requests(name)} at a time "
            f"({self._limit(name)} of --max-requests)"
        )

    def close(self) -> None:
        """Admits nothing from now on."""
        with self._lock:
            self._open = False

    def wait_until_empty(self, timeout_seconds: float) -> int:
        """Waits until all requests have given their room back; returns how many have not in time."""
        with self._lock:
            self._is_awaited = True
            self._empty.wait_for(lambda: self._requests == 0, timeout_seconds)
            return self._requests

    def _take(self, nbytes: int, requests: int, name: str, who: str = "") -> None:
        while True:
            with self._lock:
                refusal = self._refusal(nbytes, requests, name)
                if refusal is None:
                    if who:
                        self._leave_room(nbytes, who)
                    self._count(nbytes, requests, name)
                    self._peak_bytes = max(self._peak_bytes, self._bytes)
                    return
                lacks_only_bytes = self._refusal(0, requests, name) is None
                lacks_own_share = isinstance(refusal, NameLimitError)
            if not (lacks_only_bytes and self.reclaim(name if lacks_own_share else None)):
                if who and isinstance(refusal, NoBytesLeftError):
                    with self._lock:
                        if not name or self._refusal_of(nbytes, requests, name) is None:
                            self._earmark.refused(who, nbytes, refusal.retry_after_seconds)
                raise refusal

    def _leave_room(self, nbytes: int, who: str) -> None:
        """There is room for this request: does another one wait for it?

        Raises:
            NoBytesLeftError: there is none beside the bytes that are kept for that one.
        """
        kept = self._earmark.kept_from(who, nbytes)
        if kept and self._bytes + nbytes + kept > self.budget_bytes:
            raise NoBytesLeftError(
                f"{format_bytes(nbytes)} are needed; {format_bytes(self._bytes)} of {format_bytes(self.budget_bytes)} "
                f"are in use (--memory-budget), and {format_bytes(kept)} are kept for a request that waits for long",
                self._retry_seconds(),
            )
        self._earmark.admitted(who, nbytes)

    def _count(self, nbytes: int, requests: int, name: str) -> None:
        """So much more is in flight, or less."""
        self._bytes += nbytes
        self._requests += requests
        if name:
            self._bytes_of[name] += nbytes
            self._requests_of[name] += requests
            if not self._bytes_of[name] and not self._requests_of[name]:
                del self._bytes_of[name], self._requests_of[name]

    def _refusal(self, nbytes: int, requests: int, name: str) -> ServerError | None:
        if not self._open and requests:
            return StoppingError()
        if self.starting:
            return StartingError(
                "the server is starting: it compiles, a minute or two the first time "
                "(lovasz ping HOST:PORT --wait 300 waits for it)"
            )
        if self.failing and requests:
            return DeviceError("the server's device does not answer; try another server")
        if self._requests + requests > self.max_requests:
            return NoRequestsLeftError(
                f"{self._requests} requests are in flight, of at most {self.max_requests} (--max-requests); "
                f"{requests} more would be needed",
                self._retry_seconds(),
            )
        if self._bytes + nbytes > self.budget_bytes:
            return NoBytesLeftError(
                f"{format_bytes(nbytes)} are needed; {format_bytes(self._bytes)} of "
                f"{format_bytes(self.budget_bytes)} are in use (--memory-budget)",
                self._retry_seconds(),
            )
        return self._refusal_of(nbytes, requests, name) if name else None

    def _refusal_of(self, nbytes: int, requests: int, name: str) -> NameLimitError | None:
        """Why there is no room in a name's share."""
        held, most = self._requests_of[name], self.most_requests(name)
        if requests and held + requests > most:
            return NameLimitError(
                f"{held} requests of {name} are in flight, of at most {most} ({self._limit(name)} of --max-requests); "
                f"{requests} more would be needed",
                self._retry_seconds(),
            )
        held, most = self._bytes_of[name], self.most_bytes(name)
        if nbytes and held + nbytes > most:
            return NameLimitError(
                f"{format_bytes(nbytes)} are needed; the requests of {name} hold {format_bytes(held)} of at most "
                f"{format_bytes(most)} ({self._limit(name)} of --memory-budget)",
                self._retry_seconds(),
            )
        return None

    def _limit(self, name: str) -> str:
        """As the tokens file has it."""
        return f"budget={self._share_of(name):g}"

    def _retry_seconds(self) -> float:
        """About as long as room is held; random, so that callers refused together do not come back together."""
        delay = self._mean_held_seconds * random.uniform(0.5, 1.5)
        return min(max(delay, _MIN_RETRY_SECONDS), _MAX_RETRY_SECONDS)

    def _give_back(self, nbytes: int, requests: int, name: str, held_seconds: float) -> None:
        with self._lock:
            self._count(-nbytes, -requests, name)
            if self._is_awaited and self._requests == 0:
                self._empty.notify_all()
            if requests:
                self._mean_held_seconds += 0.1 * (held_seconds - self._mean_held_seconds)
