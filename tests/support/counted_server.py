"""A server that counts the functions of this project that its threads call for requests."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import Counter
from pathlib import Path
from types import FrameType

from support.fork_server import ForkedServer
from support.waiting import eventually

import lovasz

_TESTS = str(Path(__file__).parents[1])
_OWN = tuple(os.path.join(folder, "") for folder in lovasz.__path__)
"""The folders of this project's code. Its checkout may have any name, and may hold the libraries."""
_COUNTED = "steps"


class CountedServer(ForkedServer):
    """``with CountedServer([...]) as server``: as ServerProcess."""

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(arguments)
        code = f"import sys; sys.path.insert(0, {_TESTS!r}); from support.counted_server import main; sys.exit(main())"
        self._command[1:3] = ["-c", code]

    def steps(self) -> int:
        """How many functions of this project were called for requests since the start."""
        before = len(self.log)
        self._process.send_signal(signal.SIGUSR1)
        assert eventually(lambda: any(line["event"] == _COUNTED for line in self.log[before:]))
        (said,) = (line for line in self.log[before:] if line["event"] == _COUNTED)
        return int(str(said["count"]))


def is_own(frame: FrameType) -> bool:
    """Whether a function is this project's. Those of libraries, and of dataclasses, differ from version to version."""
    return frame.f_code.co_filename.startswith(_OWN)


def main() -> int:
    """Runs the server."""
    from lovasz.server.__main__ import main as serve

    counts: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and is_own(frame):
            counts[threading.current_thread().name.rpartition("_")[0]] += 1

    threading.setprofile(count)
    signal.signal(
        signal.SIGUSR1,
        lambda *_: logging.getLogger("lovasz.server").info(
            _COUNTED, extra={"count": counts["socket-call"] + counts["call"]}
        ),
    )
    return serve()
