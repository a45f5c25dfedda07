"""Reads the stream of one request in a thread of its own, so that the server never waits forever for a caller."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lovasz import wire
from lovasz.server.errors import AbandonedError, StalledError
from lovasz.server.memory.staging import Staging
from lovasz.spec import InvalidInput
from lovasz.v1 import loss_pb2 as pb

LEAST_BYTES = 64 << 10
"""The least bytes of a payload that have to come in each period of the stall timeout, unless it is complete."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long the server waits for a caller.

    Attributes:
        header_seconds: for the header.
        stall_seconds: for each :data:`LEAST_BYTES` of the payload.
        payload_seconds: for the whole payload, of which the part that was due has to be there at any time:
            ``stall_seconds`` after half of this time, half of it.
    """

    header_seconds: float
    stall_seconds: float
    payload_seconds: float


class Receiver:
    """Receives the header, and then the payload once there is a staging for it.

    The reading thread ends with the stream, at the latest when the call ends. After :meth:`stop` it does not use the
    staging any more.
    """

    def __init__(
        self,
        messages: Iterator[pb.ComputeStreamRequest | memoryview],
        start: Callable[[Callable[[], None]], object],
        patience: Patience,
        has_left: Callable[[], bool],
    ) -> None:
        """Begins to read.

        Args:
            messages: the stream, chunks as memoryviews.
            start: runs a function in another thread.
            patience: how long to wait for the caller.
            has_left: whether the caller went away; asked if the stream ends too early.
        """
        self._messages = messages
        self._patience = patience
        self._has_left = has_left
        self._changed = threading.Condition()
        self._header: pb.RequestHeader | None = None
        self._staging: Staging | None = None
        self._assembly: wire.Assembly | None = None
        self._finished = self._stopped = False
        self._error: BaseException | None = None
        start(self._read)

    def header(self) -> pb.RequestHeader:
        """Waits for the header.

        Raises:
            InvalidInput: the stream does not begin with a header.
            StalledError: it did not come in time.
            AbandonedError: the caller went away.
        """
        with self._changed:
            seconds = self._patience.header_seconds
            self._changed.wait_for(lambda: self._header is not None or self._finished, seconds)
            self._raise_error()
            if self._header is None:
                raise StalledError.of("header", seconds, "--header-timeout")
            return self._header

    def payload(self, staging: Staging) -> None:
        """Receives the payload into a staging.

        Raises:
            InvalidInput: it is longer or shorter than the header declared.
            StalledError: it came too slowly, or not at all.
            AbandonedError: the caller went away.
        """
        with self._changed:
            assembly = self._assembly = staging.assembly()
            self._staging = staging
            self._changed.notify_all()
            started = time.monotonic()
            mark, since, stall_seconds = 0, started, self._patience.stall_seconds
            while not self._finished:
                wait = min(since + stall_seconds, self._due(assembly, started)) - time.monotonic()
                self._changed.wait_for(lambda: self._finished, max(0.0, wait))
                now = time.monotonic()
                if self._finished:
                    break
                if now >= since + stall_seconds:
                    if assembly.received - mark < LEAST_BYTES:
                        raise StalledError(
                            f"{assembly.received} of {assembly.expected} bytes of the payload arrived, and less than "
                            f"{LEAST_BYTES} of them in the last {stall_seconds:g} s (--stall-timeout)"
                        )
                    mark, since = assembly.received, now
                if now >= self._due(assembly, started):
                    raise StalledError(
                        f"{assembly.received} of {assembly.expected} bytes of the payload arrived in "
                        f"{now - started:.0f} s, too few to be complete within "
                        f"{self._patience.payload_seconds:g} s (--payload-timeout)"
                    )
            self._raise_error()

    def _due(self, assembly: wire.Assembly, started: float) -> float:
        """When more of the payload has to be there than is now (``time.monotonic``)."""
        part = assembly.received / max(1, assembly.expected)
        return started + self._patience.stall_seconds + part * self._patience.payload_seconds

    def stop(self) -> None:
        """From now on the staging is not used."""
        with self._changed:
            self._stopped = True
            self._staging = self._assembly = None
            self._changed.notify_all()

    def _raise_error(self) -> None:
        """Raises the error of the reading thread, and forgets it: its trace leads to frames that hold the tensors."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error

    def _read(self) -> None:
        try:
            first = next(self._messages, None)
            if first is None and self._has_left():
                raise AbandonedError
            if not isinstance(first, pb.ComputeStreamRequest) or not first.HasField("header"):
                raise InvalidInput("header", "the stream does not begin with one; expected the header, then chunks")
            with self._changed:
                self._header = first.header
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._staging is not None or self._stopped)
            for message in self._messages:
                if not isinstance(message, memoryview):
                    raise InvalidInput("message", "got a message without a chunk; expected chunks after the header")
                with self._changed:
                    if self._staging is None or self._assembly is None:
                        return
                    self._staging.add(self._assembly, message)
            with self._changed:
                assembly = self._assembly
            if assembly is not None and assembly.received < assembly.expected and self._has_left():
                raise AbandonedError
            with self._changed:
                if self._staging is not None and self._assembly is not None:
                    self._staging.finish(self._assembly)
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()
