"""The file of a Unix socket: put in place, watched, and removed only by the server that made it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lovasz.server.transport.socket_file import Place, SocketFile


@contextmanager
def listening(path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> Iterator[SocketFile]:
    """A socket that listens, with its file at a path."""

    with socket.socket(socket.AF_UNIX, kind) as listener:

        def bind(short: str) -> None:
            listener.bind(short)
            listener.listen()

        yield SocketFile(str(path), bind)


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as caller:
        return caller.connect_ex(str(path)) == 0


def test_a_file_is_put_in_place_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listening(path) as file:
        assert (file.look(), connects(path)) == (Place.OURS, True)
        assert list(tmp_path.iterdir()) == [path]
        file.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_file_of_a_successor_is_neither_ours_nor_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with listening(path) as first:
        path.unlink()
        assert first.look() is Place.EMPTY
        with listening(path) as second:
            assert (first.look(), second.look()) == (Place.ANOTHER, Place.OURS)
            first.remove()
            assert (second.look(), connects(path)) == (Place.OURS, True)
            second.remove()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_a_live_socket_is_not_replaced_and_a_dead_one_is(tmp_path: Path, kind: socket.SocketKind) -> None:
    path = tmp_path / "s"
    with listening(path, kind) as file:
        with pytest.raises(OSError, match="another server is there"), listening(path):
            pass
        assert file.look() is Place.OURS
    assert path.exists(), "left behind, as by a server that was killed"
    with listening(path) as again:
        assert (again.look(), connects(path)) == (Place.OURS, True)
        again.remove()


def test_a_path_of_any_length_that_callers_can_use_is_taken(tmp_path: Path) -> None:
    path = tmp_path / ("s" * (107 - len(os.fsencode(tmp_path)) - 1))
    assert len(os.fsencode(path)) == 107
    with listening(path) as file:
        assert connects(path)
        file.remove()


def test_nothing_is_left_of_a_socket_that_cannot_be_bound(tmp_path: Path) -> None:
    def bind(short: str) -> None:
        Path(short).touch()
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        SocketFile(str(tmp_path / "s"), bind)
    assert list(tmp_path.iterdir()) == []
