"""Tokens: each has a name, and whoever sends it is known by that name."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lovasz.server.access.limits import UNLIMITED, Limits
from lovasz.server.access.watched_files import WatchedFiles

MAX_NAMES = 256
"""Different names in one file: each is a value of a metric's label."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{16,512}")
_HASH = re.compile(r"sha256:([0-9a-fA-F]{64})")
_EXPECTED = "expected name:token or name:sha256:HASH"


@dataclass(frozen=True)
class _Lines:
    """What a file says.

    Attributes:
        names: the name of each keyed hash.
        limits: those of the names that have some.
    """

    names: dict[bytes, str]
    limits: dict[str, Limits]


class Tokens:
    """The tokens of a file.

    It keeps no token: only keyed hashes, under a key that is made at each start. So the time that a look-up takes tells
    nothing about any token.
    """

    def __init__(self, option: str, path: str) -> None:
        """Reads the file.

        Args:
            option: the option that names it, for messages.

        Raises:
            ConfigError: it cannot be read, or is invalid.
        """
        self._key = os.urandom(32)
        self._file = WatchedFiles([(option, path)], self._parse)
        self.check = self._file.check

    @property
    def names(self) -> frozenset[str]:
        """The names in the file."""
        return frozenset(self._file.value.names.values())

    @property
    def is_valid(self) -> bool:
        """Whether the file was valid when it was last read."""
        return self._file.is_valid

    def name_of(self, token: str) -> str | None:
        """Whose token it is; None if it is in no line of the file."""
        return self._file.value.names.get(self._keyed(hashlib.sha256(token.encode(errors="replace")).digest()))

    def limits_of(self, name: str) -> Limits:
        """What the callers of a name may take."""
        return self._file.value.limits.get(name, UNLIMITED)

    def _keyed(self, digest: bytes) -> bytes:
        return hmac.digest(self._key, digest, "sha256")

    def _parse(self, contents: Sequence[bytes]) -> _Lines:
        """What the lines say.

        Raises:
            ValueError: a line is invalid. The text has its number, and nothing of a token.
        """
        try:
            lines = contents[0].decode("utf-8").splitlines()
        except UnicodeDecodeError:
            raise ValueError("not a text in UTF-8") from None
        names: dict[bytes, str] = {}
        limits: dict[str, Limits] = {}
        for number, line in enumerate(map(str.strip, lines), start=1):
            if not line or line.startswith("#"):
                continue
            name, separator, rest = line.partition(":")
            token, *words = rest.split() or [""]
            if not separator or not _NAME.fullmatch(name):
                raise ValueError(
                    f"line {number}: {_EXPECTED}, with a name of 1 to 64 letters, digits and the characters . _ -"
                )
            hashed = _HASH.fullmatch(token)
            if hashed is None and not _TOKEN.fullmatch(token):
                raise ValueError(
                    f"line {number}: {_EXPECTED}, with a token of 16 to 512 letters, digits and the characters "
                    "- . _ ~ + / =, or a hash of 64 hexadecimal digits"
                )
            digest = bytes.fromhex(hashed[1]) if hashed else hashlib.sha256(token.encode()).digest()
            if names.setdefault(self._keyed(digest), name) != name:
                raise ValueError(f"line {number}: the token of {name} is that of another name, too")
            if words:
                try:
                    limit = Limits.parsed(words)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from None
                if limits.setdefault(name, limit) != limit:
                    raise ValueError(f"line {number}: another line of {name} has other limits; expected the same")
        if not names:
            raise ValueError(f"no token; {_EXPECTED} in each line")
        if len(set(names.values())) > MAX_NAMES:
            raise ValueError(f"{len(set(names.values()))} different names; expected at most {MAX_NAMES}")
        return _Lines(names, limits)


def token_file(option: str, path: str) -> Tokens | None:
    """The tokens of a file; None if no file is named.

    Raises:
        ConfigError: it cannot be read, or is invalid.
    """
    return Tokens(option, path) if path else None


def bearer(authorization: str) -> str | None:
    """The token in the value of an ``authorization`` header; None if its scheme is another one than Bearer."""
    scheme, _, token = authorization.strip().partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None
