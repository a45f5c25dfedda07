"""The file of a Unix socket that this server listens on: put in place, watched, and removed only while it is ours."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import stat
from collections.abc import Callable
from enum import Enum


class Place(Enum):
    """What is at the path of a socket."""

    OURS = "ours"
    EMPTY = "empty"
    ANOTHER = "another"
    """A file that somebody else put there, such as the socket of another server."""


class SocketFile:
    """A socket's file. It is held open, so that the inode number is not reused while this server compares with it.

    Attributes:
        path: where it is.
    """

    def __init__(self, path: str, bind: Callable[[str], object]) -> None:
        """Lets a socket be bound in the same directory under a name of its own, then moves its file to the path.

        gRPC removes whatever file is at the path that it was told to bind, when it binds and when it stops: this one
        leaves nothing there that could belong to another server.

        Args:
            bind: binds a socket to a path that is short, whatever the length of ``path``.

        Raises:
            OSError: the file cannot be made, or another server listens there.
        """
        self.path = path
        if os.path.exists(path):
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise OSError(errno.EEXIST, "a file that is not a socket is there")
            if _answers(path):
                raise OSError(errno.EADDRINUSE, "another server is there")
        folder = os.path.dirname(path) or "."
        if not os.path.isdir(folder):
            raise OSError(errno.ENOENT, f"got the folder {folder}, which is not there; make it first")
        directory = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        name = f".lovasz-{secrets.token_hex(8)}"
        try:
            bind(f"/proc/self/fd/{directory}/{name}")
            self._file = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            os.rename(name, path, src_dir_fd=directory)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=directory)
            raise
        finally:
            os.close(directory)

    def look(self) -> Place:
        """What is at the path now."""
        try:
            found = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return Place.EMPTY
        return Place.OURS if os.path.samestat(found, os.fstat(self._file)) else Place.ANOTHER

    def remove(self) -> None:
        """Removes the file if it is still ours. Call it before the socket is closed, and once."""
        if self.look() is Place.OURS:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        os.close(self._file)


def _answers(path: str) -> bool:
    """Whether something listens on the Unix socket at a path, of whatever type."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
        except OSError as error:
            return error.errno == errno.EPROTOTYPE
        return True
