"""The log is written beside everything else: a standard error that blocks, or is gone, holds up nobody."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import TextIO

import pytest
from support.waiting import eventually

from lovasz.server.observe.log_writer import LogWriter


@pytest.fixture
def pipe() -> Iterator[tuple[int, TextIO]]:
    """A pipe as standard error: its end to read, and the stream that writes to it."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with io.TextIOWrapper(os.fdopen(writer, "wb", buffering=0), write_through=True) as stream:
        yield reader, stream
        with suppress(OSError):
            os.close(reader)


def logger_of(writer: LogWriter) -> logging.Logger:
    logger = logging.Logger("written", logging.INFO)
    writer.setFormatter(logging.Formatter("%(message)s %(lines)s", defaults={"lines": ""}))
    logger.addHandler(writer)
    return logger


def fill(stream: TextIO) -> int:
    """Fills the pipe, so that who writes to it waits; returns how many bytes are in it."""
    os.set_blocking(stream.fileno(), False)
    filled = 0
    with suppress(BlockingIOError):
        while True:
            filled += os.write(stream.fileno(), b"\n")
    os.set_blocking(stream.fileno(), True)
    return filled


def test_lines_are_written_in_their_order_before_a_flush_returns(pipe: tuple[int, TextIO]) -> None:
    writer = LogWriter(pipe[1])
    for number in range(20):
        logger_of(writer).info("line %d", number)
    writer.flush()
    assert os.read(pipe[0], 1 << 16).decode().split() == [word for n in range(20) for word in ("line", f"{n}")]


def test_nobody_waits_for_a_pipe_that_is_full_and_what_was_left_out_is_counted(pipe: tuple[int, TextIO]) -> None:
    reader, stream = pipe
    filled = fill(stream)
    writer = LogWriter(stream, most_lines=3)
    logger = logger_of(writer)
    logger.info("first")
    assert eventually(lambda: not writer._lines.qsize())  # The thread has it, and waits for the pipe.
    for number in range(10):
        logger.info("line %d", number)
    writer.flush()  # Does not wait for ever either.
    taken = b""
    while len(taken) < filled or not taken.endswith(b"line 2 \n"):
        with suppress(BlockingIOError):
            taken += os.read(reader, 1 << 16)
    logger.info("last")
    writer.flush()
    lines = taken[filled:].decode().splitlines() + os.read(reader, 1 << 16).decode().splitlines()
    assert [line.strip() for line in lines] == [
        *("first", "line 0", "line 1", "line 2"),
        "lines of the log were left out: standard error does not take them 7",
        "last",
    ]


def test_a_reader_that_has_gone_ends_nothing(pipe: tuple[int, TextIO]) -> None:
    reader, stream = pipe
    writer = LogWriter(stream)
    os.close(reader)
    for _ in range(3):
        logger_of(writer).info("nobody reads this")
    writer.flush()
