"""How checks run commands and report: a line for what is as it should be, an error for the first thing that is not."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ERROR_LINES = 40


class CheckFailed(Exception):
    """Something is not as it should be."""


def ok(text: str) -> None:
    print(f"ok: {text}", flush=True)


def require(condition: object, text: str) -> None:
    """Reports that the text is true, or fails with it."""
    if not condition:
        raise CheckFailed(text)
    ok(text)


def run(
    command: Sequence[object], *, env: dict[str, str] | None = None, stdin: str | None = None, check: bool = True
) -> str:
    """Runs a command in the root of the repository and returns what it prints.

    Raises:
        CheckFailed: it failed, or is not installed; the text ends with what it said.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, cwd=ROOT, env=env, input=stdin, text=True, capture_output=True)
    except FileNotFoundError:
        raise CheckFailed(f"{words[0]} is not installed") from None
    if check and done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-ERROR_LINES:])
        raise CheckFailed(f"{' '.join(words)} (exit {done.returncode})\n{tail}")
    return done.stdout


def wait_for(condition: Callable[[], bool], text: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise CheckFailed(f"{text}: not within {seconds:.0f} s")
        time.sleep(0.5)


def compose_environment(**more: str) -> dict[str, str]:
    """The environment without the variables that select other Compose files or profiles."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COMPOSE_")} | more
