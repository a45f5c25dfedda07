"""``lovasz token``: makes a token for a name, and its line for the server's file."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import secrets
import sys

_TOKEN_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Makes it the parser of this command."""
    parser.description = (
        "Makes a random token. The token goes to standard output, for the trainer; the line with its hash "
        "goes to the server's tokens file."
    )
    parser.add_argument("name", metavar="NAME", type=_name, help="who will use it; logs and metrics show this name")
    parser.add_argument(
        "--tokens",
        metavar="FILE",
        help="the file that lovasz-server --tokens reads: the line is appended to it, with the limits that NAME has "
        "there; the file is created if it does not exist (default: the line goes to standard error)",
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Exit status: 0.

    Raises:
        OSError: the file cannot be written.
    """
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    line = f"{parsed.name}:sha256:{hashlib.sha256(token.encode()).hexdigest()}"
    if parsed.tokens is None:
        print(line, file=sys.stderr)
    else:
        _append(parsed.tokens, line)
    print(token)
    return 0


def _append(path: str, line: str) -> None:
    """One write, so that a server never reads half a line. The line gets the limits that its name has."""
    with open(path, "ab+", buffering=0, opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.seek(0)
        text = file.read().decode(errors="replace")
        limits = _limits(text, line.partition(":")[0])
        line_end = "\n" if text and not text.endswith("\n") else ""
        file.write(f"{line_end}{' '.join([line, *limits])}\n".encode())


def _limits(text: str, name: str) -> list[str]:
    """What stands after the tokens of a name, such as ``weight=2``."""
    lines = [line.split()[1:] for line in text.splitlines() if line.strip().startswith(f"{name}:")]
    return next(filter(None, lines), [])


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected 1 to 64 letters, digits and the characters . _ -")
    return text
