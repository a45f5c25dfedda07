"""A stand-in for the streams of torch.cuda, each thread's current one included. Work on them is never queued."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch


class Stream:
    """A stream.

    Attributes:
        name: names it in failures.
        waits: how often somebody has waited for its work.
        when_waited: called each time.
    """

    def __init__(self, name: str) -> None:
        self.name, self.waits = name, 0
        self.when_waited: Callable[[], object] = lambda: None

    def __repr__(self) -> str:
        return self.name

    def synchronize(self) -> None:
        self.waits += 1
        self.when_waited()

    def wait_stream(self, other: Stream) -> None:
        pass

    def record_event(self) -> Stream:
        return self


class Streams(threading.local):
    """The current stream of each thread: at first the default one."""

    current = default = Stream("default")

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Streams:
    """Takes the place of torch's streams."""
    streams = Streams()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams.current)
    monkeypatch.setattr(torch.cuda, "stream", streams.on)
    return streams
