"""A folder of temporary files that only this user can reach. Those that killed servers have left are removed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress

_PREFIX = "lovasz-grpc-"
_ATTEMPTS = 10


class PrivateFolder:
    """A folder whose lock this process holds: the system takes it back, however the process ends.

    Attributes:
        path: where it is.
    """

    def __init__(self) -> None:
        """Makes the folder, and removes those of this user that no process holds.

        Raises:
            OSError: it cannot be made.
        """
        with suppress(OSError):
            _remove_left(tempfile.gettempdir())
        for _ in range(_ATTEMPTS):
            self.path = tempfile.mkdtemp(prefix=_PREFIX)
            lock = _lock(self.path)
            if lock is not None:
                self._lock = lock
                return
        raise OSError(f"{self.path}: another process removes new folders")

    def remove(self) -> None:
        """Removes the folder with what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _lock(path: str) -> int | None:
    """Takes the lock of a folder of this user: a file descriptor; None if it is held, or if the folder has gone."""
    with suppress(OSError):
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.fstat(lock)
            # Another server that starts may have taken a new folder for one that was left, and removed it.
            if held.st_uid == os.geteuid() and os.path.samestat(held, os.stat(path, follow_symlinks=False)):
                return lock
        except OSError:
            pass
        os.close(lock)
    return None


def _remove_left(parent: str) -> None:
    for name in os.listdir(parent):
        path = os.path.join(parent, name)
        if name.startswith(_PREFIX) and (lock := _lock(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
