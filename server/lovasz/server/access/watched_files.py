"""Files that are read again when they change; pipes are read once."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from lovasz.server.settings import ConfigError

_log = logging.getLogger(__name__)

ValueT = TypeVar("ValueT")


class WatchedFiles(Generic[ValueT]):
    """What some files say together. While they say nothing valid, what they said before holds.

    Attributes:
        value: what they said when they were last valid.
    """

    def __init__(self, files: Sequence[tuple[str, str]], parse: Callable[[Sequence[bytes]], ValueT]) -> None:
        """Reads them.

        Args:
            files: each with the option that names it: (option, path).
            parse: makes a value of their contents, in the same order; raises ValueError with what is wrong.

        Raises:
            ConfigError: a file cannot be read, or what they say is invalid.
        """
        self._files, self._parse = files, parse
        self._names = ", ".join(f"{option} {path}" for option, path in files)
        self._refused: object = None
        """What was last found to be wrong: the contents, or the error of reading them."""
        self._can_change = all(_can_be_read_again(path) for _, path in files)
        try:
            self._contents = self._read()
            self.value = parse(self._contents)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self._names}: {_reason(error)}") from None

    @property
    def is_valid(self) -> bool:
        """Whether they said something valid when they were last read."""
        return self._refused is None

    def check(self) -> None:
        """A chore: takes over what the files say now. If it is invalid, the log says so once."""
        if not self._can_change:
            return
        found: object = None
        try:
            if not all(_can_be_read_again(path) for _, path in self._files):
                raise OSError(errno.EINVAL, "not a regular file any more")
            found = contents = self._read()
            if contents == self._contents:
                self._refused = None
                return
            if contents == self._refused:
                return
            self.value = self._parse(contents)
        except (OSError, ValueError) as error:
            found = _reason(error) if found is None else found
            if found != self._refused:
                self._refused = found
                _log.error(
                    "files changed and cannot be used: the old contents stay in use",
                    extra={"files": self._names, "reason": _reason(error)},
                )
            return
        self._contents, self._refused = contents, None
        _log.info("files were read again", extra={"files": self._names})

    def _read(self) -> tuple[bytes, ...]:
        return tuple(Path(path).read_bytes() for _, path in self._files)


def _can_be_read_again(path: str) -> bool:
    """False for a pipe, such as that of ``<(command)``: it is empty once it was read, or holds up who opens it."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return True  # Reading it says why.
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
