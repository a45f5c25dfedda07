"""The driver's side of :mod:`core_worker`: processes that are asked questions, one at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from contenders import Contender
from workloads import Workload

SCRIPT = Path(__file__).with_name("core_worker.py")
LEAVE_SECONDS = 10


class WorkerFailed(Exception):
    """A contender raised, or its process ended. It has to be left out of what follows."""


class Worker:
    """A process for one contender and one workload. Starts at once; leave its ``with`` block to end it."""

    def __init__(self, workload: Workload, contender: Contender, device: str) -> None:
        command = [sys.executable, str(SCRIPT), workload.name, contender.value, device]
        # Outside the process group of the driver: Ctrl-C reaches the driver alone, which then ends the worker.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def ask(self, do: str, **arguments: object) -> dict[str, Any]:
        """Asks, and waits for the answer.

        Raises:
            WorkerFailed: the text says why.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerFailed(f"its process ended with status {process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(answer["error"])
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                self._process.communicate(timeout=LEAVE_SECONDS)  # closes its input, which ends it
                return
            except subprocess.TimeoutExpired:
                pass
        self._process.kill()
        self._process.communicate()
