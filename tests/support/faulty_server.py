"""A server whose device or system fails: a stand-in for hardware that a test cannot break.

Faults begin when a request with :data:`POISON` classes is computed, except "memory", which happens at random, and
"threads", which is there from the start. With "check" this request is still answered, and the next check of the idle
device hangs.
"""

from __future__ import annotations

import random
import resource
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

from support.fork_server import ForkedServer

POISON = 13

_TESTS = str(Path(__file__).parents[1])


class FaultyServer(ForkedServer):
    """``with FaultyServer("hang", [...]) as server``: as ServerProcess."""

    def __init__(self, fault: str, arguments: list[str]) -> None:
        super().__init__(arguments)
        code = f"import sys; sys.path.insert(0, {_TESTS!r}); from support.faulty_server import main; sys.exit(main())"
        self._command[1:3] = ["-c", code, fault]

    def wait(self) -> int:
        """Waits for its end; returns its exit status."""
        status = self._process.wait(60)
        self._reader.join()
        return status


def main() -> int:
    """Runs the server: the first argument of the process is the fault; the others are the server's."""
    fault = sys.argv.pop(1)
    import torch

    import lovasz.server.device.engine as engine
    import lovasz.server.device.self_test as self_test
    import lovasz.server.transport.self_check as self_check
    import lovasz.server.transport.threads as threads
    from lovasz.server.__main__ import main as serve

    real, broken, dice = engine.submit, threading.Event(), random.Random(0)

    def submit(requests: list[Any], *arguments: Any, **options: Any) -> Any:
        if any(request.layout.channels == POISON for request in requests):
            broken.set()
        if fault == "memory" and len(requests) > 1 and dice.random() < 0.7:
            raise torch.OutOfMemoryError("no memory left")
        if fault == "hang" and broken.is_set():
            threading.Event().wait()
        if fault == "lost" and broken.is_set():
            raise RuntimeError("CUDA error: unspecified launch failure")
        return real(requests, *arguments, **options)

    def check(*arguments: Any, **options: Any) -> Any:
        if fault == "check" and broken.is_set():
            threading.Event().wait()
        return submit(*arguments, **options)

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("can't start new thread")

    engine.submit, self_test.submit = submit, check  # type: ignore[attr-defined]
    if fault == "gRPC":
        self_check._ANSWER_SECONDS = 1.0
        whole = threads.CallThreads.submit

        def submit_call(*arguments: Any, **options: Any) -> Any:
            return (refuse if broken.is_set() else whole)(*arguments, **options)

        threads.CallThreads.submit = submit_call  # type: ignore[method-assign]
    if fault == "threads":
        words = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, ((words * resource.getpagesize()) + (600 << 20),) * 2)
    return serve()
