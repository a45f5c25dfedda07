"""Asks an object in a child process: its methods are called from here, and their results come back.

    with Child("benchmarks.core.worker:Worker", workload, contender) as worker:
        seconds = worker.ask("block", calls=3, untimed=1)

The child makes the object from the arguments and then waits for questions. While it waits it uses no core. It ends
when this process closes the connection, or ends. ``python`` is the interpreter that runs it, which may have other
packages than this one. What the child prints goes to the standard error: the standard output is for results.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
ANSWER_SECONDS = 300.0
LEAVE_SECONDS = 10.0
"""How long a child may take to end before it is killed."""


class ChildFailed(Exception):
    """A child raised an error, ended, or did not answer in time."""


class Child:
    """An object in a process of its own, which starts at once. Leave the ``with`` block to end it."""

    def __init__(
        self,
        target: str,
        *arguments: object,
        python: Path = Path(sys.executable),
        log: IO[str] | None = None,
        leave_seconds: float = LEAVE_SECONDS,
    ) -> None:
        """
        Args:
            target: the class of the object, ``"package.module:Class"``. If it has a method ``close``, the child calls
                that at the end.
            arguments: of the class.
            log: what the child prints goes there.
            leave_seconds: how long it may take to end.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # absolute(), not resolve(): an environment's interpreter is a symbolic link.
                [str(python.absolute()), "-m", "benchmarks.child", str(theirs.fileno())],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log or sys.stderr,
                stderr=log,
                pass_fds=[theirs.fileno()],
                # Ctrl-C reaches this process alone, which then ends its children.
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        self._leave_seconds = leave_seconds
        self._connection.send((target, arguments))

    def ask(self, method: str, *arguments: object, **keywords: object) -> Any:
        """Calls a method of the object and returns its result.

        Raises:
            ChildFailed: the text says why.
        """
        self._send(method, arguments, keywords)
        return self._receive()

    def _send(self, method: str, arguments: Sequence[object], keywords: dict[str, object]) -> None:
        with suppress(BrokenPipeError):  # The child has ended, as _receive() reports.
            self._connection.send((method, arguments, keywords))

    def _receive(self) -> Any:
        try:
            if not self._connection.poll(ANSWER_SECONDS):
                raise ChildFailed(f"no answer within {ANSWER_SECONDS:g} s")
            succeeded, result = self._connection.recv()
        except (EOFError, ConnectionResetError):
            raise ChildFailed(f"its process ended with status {self._process.wait()}") from None
        if not succeeded:
            raise ChildFailed(result)
        return result

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.close()  # Which ends an idle child.
        if kind is not None:
            self._process.terminate()
        try:
            self._process.wait(self._leave_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def ask_all(children: Sequence[Child], method: str, *arguments: object) -> list[Any]:
    """Asks all children at once, and waits for all results.

    Raises:
        ChildFailed: the first failure, in the order of the children.
    """
    for child in children:
        child._send(method, arguments, {})
    return [child._receive() for child in children]


# --- In the child -----------------------------------------------------------------------------------------------------


def _made(target: str, arguments: Sequence[object], stack: ExitStack) -> object:
    module, _, name = target.partition(":")
    made: object = getattr(importlib.import_module(module), name)(*arguments)
    if close := getattr(made, "close", None):
        stack.callback(close)
    return made


def _serve(connection: Connection) -> None:
    """Answers each question with (True, the result) or (False, the text of the error)."""
    with ExitStack() as stack, suppress(EOFError, BrokenPipeError, ConnectionResetError):
        target, arguments = connection.recv()
        made, failure = None, ""
        try:
            made = _made(target, arguments, stack)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        while True:
            method, arguments, keywords = connection.recv()
            try:
                answer = (False, failure) if failure else (True, getattr(made, method)(*arguments, **keywords))
            except Exception as error:
                answer = False, f"{type(error).__name__}: {error}"
            connection.send(answer)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
