"""The tables of segments whose pixels are held by several ranks: what each rank sends of them, so that they are added.

Only the bins that matter are sent: down to the smallest foreground error, and of each octave only where a rank has
pixels. Where bins have few pixels, a word is sent as a short word of 32 bits, with the same numbers. The ranks first
tell each other how many pixels their bins have, so all choose alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lovasz.core.backends.numba import bins
from lovasz.core.backends.numba.call import Call
from lovasz.core.backends.numba.intrinsics import compiled
from lovasz.core.backends.numba.parts import Parts
from lovasz.core.backends.numba.planes import Integers, claim
from lovasz.core.ranks import Ranks
from lovasz.core.word import REST_BITS, REST_SUM_BITS

BINS = bins.BINS
_SPANS, _FIRST_BINS = bins.SPANS, bins.FIRST_BINS

_COUNT_BITS = 9
_SHORT_REST_BITS = _COUNT_BITS + REST_BITS
"""A short word is pixels x 2^_SHORT_REST_BITS + the sum of their rests, for up to 2^_COUNT_BITS - 1 pixels."""
assert _COUNT_BITS + _SHORT_REST_BITS <= 31, "a short word would have the sign bit set"
_SHORT_REST_MASK, _REST_MASK = (1 << _SHORT_REST_BITS) - 1, (1 << REST_SUM_BITS) - 1


class JointTables:
    """Adds tables over the ranks: ``survey`` and ``receive`` for some segments at a time, ``send`` once between."""

    def __init__(
        self, call: Call, ranks: Ranks, part_tables: npt.NDArray[np.int64], firsts: Integers, parts: Parts, cut: bool
    ) -> None:
        """
        Args:
            cut: ``Rules.cut``.
            firsts: the first part of each segment, whose table holds those of the other parts.
            parts: ``lowest`` and ``highest`` are changed to the range of bins of all ranks.
        """
        self._call, self._ranks, self._part_tables, self._firsts, self._parts = call, ranks, part_tables, firsts, parts
        self._cut = cut
        self._bounds = np.empty((len(firsts), 2), np.int64)
        self._most = np.empty((len(firsts), 2, _SPANS), np.int64)
        self._sent: Sent | None = None
        self._words: tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]] | None = None

    def survey(self, some: slice) -> None:
        """Finds what of the tables of some segments matters, once they are counted."""
        self._call.run(
            survey,
            firsts=self._firsts[some],
            parts=self._parts,
            cut=self._cut,
            part_tables=self._part_tables,
            bounds=self._bounds[some],
            most=self._most[some],
        )

    def send(self) -> None:
        """Adds what matters over the ranks. A collective call."""
        ranks, parts, firsts = self._ranks, self._parts, self._firsts
        ranks.reduce((), [self._bounds, self._most])
        low, stop = -self._bounds[:, 0], self._bounds[:, 1] + 1
        # Background below the smallest foreground error has g = 0.
        parts.lowest[firsts], parts.highest[firsts] = low, np.maximum(parts.highest[firsts], stop - 1)
        self._sent, short_count, long_count = chosen(low, stop, self._most, len(ranks.images))
        short = self._call.scratch.array("short words", (short_count,), np.int32)
        long = self._call.scratch.array("long words", (long_count,), np.int64)
        self._words = short, long
        self._call.run(pack, firsts=firsts, sent=self._sent, part_tables=self._part_tables, short=short, long=long)
        ranks.add([short, long])

    def receive(self, some: slice) -> None:
        """Replaces the tables of some segments by those of all ranks."""
        assert self._sent is not None
        assert self._words is not None
        short, long = self._words
        columns: tuple[Any, ...] = self._sent
        self._call.run(
            unpack,
            firsts=self._firsts[some],
            sent=Sent(*(column[some] for column in columns)),
            part_tables=self._part_tables,
            short=short,
            long=long,
        )


class Sent(NamedTuple):
    """The words of each segment's table that are sent: (segments, 2, ``bins.SPANS``), of background and foreground.

    Attributes:
        first, stop: the bins [first, stop).
        place: where they begin among all short words, or among all others.
        is_short: whether they are sent as short words.
    """

    first: npt.NDArray[np.int64]
    stop: npt.NDArray[np.int64]
    place: npt.NDArray[np.int64]
    is_short: npt.NDArray[np.bool_]


def chosen(low: Integers, stop: Integers, most: npt.NDArray[np.int64], ranks: int) -> tuple[Sent, int, int]:
    """The words to send, and the numbers of short ones and of others.

    Args:
        low, stop: the bins of each segment that matter, [low, stop).
        most: the result of ``survey``, the largest of all ranks.
    """
    first = np.maximum(_FIRST_BINS[:-1], low[:, None, None])
    last = np.minimum(_FIRST_BINS[1:], stop[:, None, None])
    count = np.where(most > 0, np.maximum(last - first, 0), 0)
    first = np.broadcast_to(first, count.shape).copy()
    is_short = most * ranks < 1 << _COUNT_BITS
    short, long = np.where(is_short, count, 0).ravel(), np.where(is_short, 0, count).ravel()
    ends = np.where(is_short.ravel(), np.cumsum(short), np.cumsum(long)).reshape(count.shape)
    return Sent(first, first + count, ends - count, is_short), int(short.sum()), int(long.sum())


@compiled
def survey(
    tasks: Integers,
    firsts: Integers,
    parts: Parts,
    cut: bool,
    part_tables: npt.NDArray[np.int64],
    bounds: npt.NDArray[np.int64],
    most: npt.NDArray[np.int64],
) -> None:
    """Finds what of each segment's table matters.

    Args:
        bounds: written: minus the lowest bin in use; the last bin with foreground, or -1. With ``cut``, foreground may
            have an error of 0, which no table counts: the last bin in use.
        most: written: no bin has more pixels than this; 0 if none has any: (segments, 2, ``bins.SPANS``).
    """
    while True:
        s = claim(tasks, len(firsts))
        if s >= len(firsts):
            break
        table, lowest, highest = part_tables[firsts[s]], parts.lowest[firsts[s]], parts.highest[firsts[s]]
        bounds[s, 0] = -lowest
        last = highest
        while not cut and last >= lowest and table[BINS + last] == 0:
            last -= 1
        bounds[s, 1] = last if last >= lowest else -1
        for half in range(2):
            for span in range(_SPANS):
                first, stop = max(lowest, _FIRST_BINS[span]), min(highest + 1, _FIRST_BINS[span + 1])
                words, bits = table[half * BINS + first : half * BINS + max(first, stop)], np.int64(0)
                for i in range(len(words)):
                    bits |= words[i]
                most[s, half, span] = np.int64(np.uint64(bits) >> np.uint64(REST_SUM_BITS))


@compiled
def pack(
    tasks: Integers, firsts: Integers, sent: Sent, part_tables: npt.NDArray[np.int64], short: Integers, long: Integers
) -> None:
    """Writes the words that are sent, one after the other."""
    while True:
        s = claim(tasks, len(firsts))
        if s >= len(firsts):
            break
        for half in range(2):
            for span in range(_SPANS):
                first, place = half * BINS + sent.first[s, half, span], sent.place[s, half, span]
                count = sent.stop[s, half, span] - sent.first[s, half, span]
                words = part_tables[firsts[s], first : first + count]
                if sent.is_short[s, half, span]:
                    short_words = short[place : place + count]
                    for i in range(count):
                        pixels, rests = words[i] >> REST_SUM_BITS, words[i] & _REST_MASK
                        short_words[i] = np.int32((pixels << _SHORT_REST_BITS) + rests)
                else:
                    long[place : place + count] = words


@compiled
def unpack(
    tasks: Integers, firsts: Integers, sent: Sent, part_tables: npt.NDArray[np.int64], short: Integers, long: Integers
) -> None:
    """Replaces words of the tables by those that came back."""
    while True:
        s = claim(tasks, len(firsts))
        if s >= len(firsts):
            break
        for half in range(2):
            for span in range(_SPANS):
                first, place = half * BINS + sent.first[s, half, span], sent.place[s, half, span]
                count = sent.stop[s, half, span] - sent.first[s, half, span]
                words = part_tables[firsts[s], first : first + count]
                if sent.is_short[s, half, span]:
                    short_words = short[place : place + count]
                    for i in range(count):
                        word = np.int64(short_words[i])
                        words[i] = ((word >> _SHORT_REST_BITS) << REST_SUM_BITS) + (word & _SHORT_REST_MASK)
                else:
                    words[:] = long[place : place + count]
