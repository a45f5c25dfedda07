"""Segments whose pixels are held by several ranks, and that are sorted: the pixels that matter are sent to all ranks.

Every rank computes the whole segment from that, so all have the same bits, and writes the gradient of its own pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lovasz.core.backends.numba import sorting
from lovasz.core.backends.numba.call import Call
from lovasz.core.backends.numba.planes import Floats
from lovasz.core.backends.numba.segments import Rules, Segments, write_at
from lovasz.core.backends.numba.selecting import smallest_foreground
from lovasz.core.ranks import Ranks

_VOID, _FOREGROUND = 2, 1
"""Codes of the pixels that were sent; background is 0."""


def sort_sent(
    call: Call, ranks: Ranks, found: Segments, codes: npt.NDArray[np.uint8], rules: Rules
) -> npt.NDArray[np.float64]:
    """Scores segments by sorting; returns their losses.

    Each rank sends its foreground and the background above the smallest foreground error of all ranks: other
    background has g = 0. Of a segment without foreground it sends its first largest error.
    """
    own = [_pixels(call, found, s, codes, rules) for s in range(len(found.row))]
    smallest = np.array([-_bits(error[code == _FOREGROUND].min(initial=np.inf)) for error, code in own], np.int64)
    ranks.reduce((), [smallest])
    places = []
    for s, (error, code) in enumerate(own):
        if found.foreground_count[s] == 0:
            valid = np.flatnonzero(code != _VOID)
            places.append(valid[[int(error[valid].argmax())]] if len(valid) else valid)
        else:
            floor = np.int32(-smallest[s]).view(np.float32)
            places.append(np.flatnonzero((code == _FOREGROUND) | ((code != _VOID) & (error > floor))))
    counts = np.array(ranks.gather(np.array([len(some) for some in places], np.int64)))
    signed = [
        np.where(code[some] == _FOREGROUND, -error[some], error[some])
        for (error, code), some in zip(own, places, strict=True)
    ]
    sent = ranks.gather(np.concatenate(signed))
    losses = np.zeros(len(own))
    for s, (some, values) in enumerate(zip(places, pixels_of_segments(sent, counts), strict=True)):
        loss, g = _sorted(values, found, s, rules)
        losses[s] = loss
        if rules.want_grad:
            first = int(counts[: ranks.rank, s].sum())
            write_at(found, s, rules, call.planes, some.astype(np.int32), g[first : first + len(some)])
    return losses


def pixels_of_segments(sent: Sequence[Floats], counts: npt.NDArray[np.int64]) -> list[Floats]:
    """The pixels of each segment, rank after rank.

    Args:
        sent: what each rank sent: the pixels of all segments.
        counts: their numbers, (ranks, segments).
    """
    ends = np.cumsum(counts, axis=1)
    return [
        np.concatenate([data[end - n : end] for data, end, n in zip(sent, ends[:, s], counts[:, s], strict=True)])
        for s in range(counts.shape[1])
    ]


def _bits(error: np.float32) -> int:
    return int(np.float32(error).view(np.int32))


def _pixels(
    call: Call, found: Segments, s: int, codes: npt.NDArray[np.uint8], rules: Rules
) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """The errors of a segment's pixels on this rank, and their codes as they are sent."""
    pixels = slice(found.start[s], found.stop[s])
    code = codes[found.code_row[s], pixels]
    own = np.zeros(len(code), np.uint8)
    own[code == found.foreground[s]] = _FOREGROUND
    own[(code == rules.void) | (code == rules.ignored)] = _VOID
    return call.errors[found.row[s], pixels], own


def _sorted(values: Floats, found: Segments, s: int, rules: Rules) -> tuple[float, Floats]:
    """Loss and gradient of the pixels that were sent; errors of foreground have the sign bit set."""
    error, code = np.abs(values), np.signbit(values).astype(np.uint8)
    g = np.empty(len(values) if rules.want_grad else 0, np.float32)
    if found.foreground_count[s] == 0:
        return sorting.largest(error, code, _VOID, _VOID, found.weight[s], rules.cut, g), g
    keys = np.empty((2, len(values)), np.uint64)
    loss = sorting.extension(
        error,
        code,
        _FOREGROUND,
        _VOID,
        _VOID,
        smallest_foreground(error, code, _FOREGROUND),
        int(np.count_nonzero(code == _FOREGROUND)),
        found.weight[s],
        found.foreground_weight[s],
        rules.cut,
        keys[0],
        keys[1],
        g,
    )
    return loss, g
