"""Numba's cache of compiled functions on disk, whose faults cost time only: what cannot be read is compiled again."""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any

_log = logging.getLogger(__name__)


class DiskCache:
    """Wraps the cache of one function. Numba itself lets errors of the disk, and of cut files, end the call."""

    def __init__(self, cache: Any, name: str) -> None:
        """Uses Numba's own cache.

        Args:
            name: of the function, which its files begin with.
        """
        self._cache, self._name = cache, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def load_overload(self, signature: Any, context: Any) -> Any:
        """The compiled function; None if there is none, or it cannot be read."""
        try:
            return self._cache.load_overload(signature, context)
        except Exception as error:
            self._say("cannot be read: compiling again", error)
            with contextlib.suppress(OSError):
                self._cache.flush()  # So that the index leads to no spoilt file.
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        """Keeps a compiled function if the disk can."""
        try:
            self._cache.save_overload(signature, data)
        except Exception as error:
            self._say("cannot be written: continuing without it", error)

    def _say(self, what: str, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        _say_once(f"the cache of compiled functions {what}", self._cache.cache_path, self._name, reason)


@functools.lru_cache(maxsize=256)
def _say_once(what: str, folder: str, name: str, reason: str) -> None:
    _log.warning(what, extra={"folder": folder, "files": f"{name}*", "reason": reason})
