"""Segments that are counted in parts, one table per part, so that no thread is idle while another scores a segment.

The pixels of their windows are collected from all parts, and from other ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lovasz.core.backends.numba import parts as loops
from lovasz.core.backends.numba import tables
from lovasz.core.backends.numba.call import Call
from lovasz.core.backends.numba.joint_segments import pixels_of_segments
from lovasz.core.backends.numba.joint_tables import JointTables
from lovasz.core.backends.numba.parts import Parts, WindowsOfSegments
from lovasz.core.backends.numba.planes import Floats, Integers
from lovasz.core.backends.numba.segments import Rules, Segments
from lovasz.core.ranks import Ranks

MOST_PARTS = 64
"""The most parts of the segments together, unless there are more segments."""


def score(
    call: Call, ranks: Ranks | None, found: Segments, part_pixels: int, codes: npt.NDArray[Any], rules: Rules
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Scores segments, all of which are counted.

    Args:
        ranks: the ranks that have parts of these segments, too; None if there are none.
        part_pixels: about the most pixels of a part.

    Returns:
        (losses, is_fine): one per segment; if ``is_fine`` is false, counting is not exact enough, and neither the loss
        nor the gradient is written.
    """
    segment, firsts, parts = _divide(found, part_pixels, call.threads)
    part_tables = call.scratch.array("tables", (len(segment), tables.WORDS), np.int64, zero=True)
    losses, is_fine = np.zeros(len(firsts)), np.ones(len(firsts), np.bool_)
    windows = Windows(call, ranks, found, parts, rules)
    of_segments: dict[str, Any] = {"segments": found, "rules": rules}
    of_pixels: dict[str, Any] = {**of_segments, "errors": call.errors, "codes": codes}
    # A few segments at a time, one for each thread, so that their tables are still in the processor's cache.
    steps = [slice(s, min(s + call.threads, len(firsts))) for s in range(0, len(firsts), call.threads)]
    parts_of = [slice(*np.searchsorted(segment, (some.start, some.stop))) for some in steps]

    def finish(some: slice, own: slice) -> None:
        """Writes the gradients of some segments, and clears their tables."""
        if rules.want_grad:
            call.run(
                loops.look_up_parts,
                table_of_part=firsts[segment[own]],
                parts=_some(parts, own),
                part_tables=part_tables,
                is_fine=is_fine,
                places=windows.places[own],
                counts=windows.counts[own],
                first=windows.first[own],
                g=windows.g,
                planes=call.planes,
                **of_pixels,
            )
        for first in firsts[some]:
            tables.clear(part_tables[first], parts.lowest[first], parts.highest[first])

    joint = None if ranks is None else JointTables(call, ranks, part_tables, firsts, parts, rules.cut)
    for some, own in zip(steps, parts_of, strict=True):
        counted = _some(parts, own)
        call.run(loops.count_parts, parts=counted, part_tables=part_tables[own], planes=call.planes, **of_pixels)
        call.run(loops.add_parts, firsts=firsts[some], parts=parts, part_tables=part_tables)
        if joint:
            joint.survey(some)
    if joint:
        joint.send()
    for some, own in zip(steps, parts_of, strict=True):
        if joint:
            joint.receive(some)
        of_tables: dict[str, Any] = {
            "parts": parts,
            "part_tables": part_tables,
            "is_fine": is_fine,
            "windows": windows.of_segments,
        }
        call.run(loops.scan_parts, firsts=firsts[some], losses=losses, **of_tables, **of_segments)
        if not joint:
            windows.sort(some, own, codes, losses)
            finish(some, own)
    if joint:
        windows.sort(slice(0, len(firsts)), slice(0, len(segment)), codes, losses)
        for some, own in zip(steps, parts_of, strict=True):
            finish(some, own)
    return losses, is_fine


def _divide(found: Segments, part_pixels: int, threads: int) -> tuple[Integers, Integers, Parts]:
    """The segment of each part, the first part of each segment, and the parts."""
    pixels = found.stop - found.start
    per_segment = np.minimum(-(-pixels // part_pixels), min(threads, max(MOST_PARTS // len(pixels), 1)))
    segment = np.repeat(np.arange(len(pixels)), per_segment)
    firsts = np.cumsum(per_segment) - per_segment
    number = np.arange(len(segment)) - firsts[segment]
    edges = [found.start[segment] + pixels[segment] * n // per_segment[segment] for n in (number, number + 1)]
    return segment, firsts, Parts(segment, *edges, *np.zeros((2, len(segment)), np.int64))


def _some(parts: Parts, own: slice) -> Parts:
    columns: tuple[Any, ...] = parts
    return Parts(*(column[own] for column in columns))


class Windows:
    """Sorts the windows of segments whose tables have been scanned: some at a time; for a joint all at once.

    Attributes:
        of_segments: written by ``parts.scan_parts``.
        places, counts, first, g: written: the arguments of ``parts.look_up_parts``.
    """

    def __init__(self, call: Call, ranks: Ranks | None, found: Segments, parts: Parts, rules: Rules) -> None:
        self._call, self._ranks, self._found, self._parts, self._rules = call, ranks, found, parts, rules
        self._most, count = rules.windows.most, len(parts.segment)
        self._values = call.scratch.array("window values", (count, self._most), np.float32)
        self.places = call.scratch.array("window places", (count, self._most), np.int32)
        self.of_segments = WindowsOfSegments(*np.zeros((4, len(found.row)), np.int64))
        self.counts, self.first = np.zeros((2, count), np.int64)
        self.g: Floats = np.empty(0, np.float32)

    def sort(self, some: slice, own: slice, codes: npt.NDArray[Any], losses: npt.NDArray[np.float64]) -> None:
        """Sorts the windows of some segments, and adds their losses. For a joint, a collective call.

        Args:
            own: the parts of these segments.
        """
        if self._most == 0:
            return
        call, want_grad = self._call, self._rules.want_grad
        call.run(
            loops.select_parts,
            parts=_some(self._parts, own),
            segments=self._found,
            rules=self._rules,
            errors=call.errors,
            codes=codes,
            windows=self.of_segments,
            values=self._values[own],
            places=self.places[own],
            counts=self.counts[own],
        )
        values, edges = self._collect(some, own)
        threads = min(call.threads, len(edges) - 1)
        keys = call.scratch.array("keys", (2, threads, self._most), np.uint64)
        self.g = np.empty(len(values) if want_grad else 0, np.float32)
        columns: tuple[Any, ...] = self._found
        call.run(
            loops.sort_windows,
            threads=threads,
            segments=Segments(*(column[some] for column in columns)),
            windows=WindowsOfSegments(*(column[some] for column in self.of_segments)),
            edges=edges,
            values=values,
            losses=losses[some],
            g=self.g,
            own=lambda thread: {"keys": keys[0, thread], "other_keys": keys[1, thread]},
        )

    def _collect(self, some: slice, own: slice) -> tuple[Floats, Integers]:
        """The values of each segment's window, one segment after the other, and their edges; writes ``first``."""
        segment, counts = self._parts.segment[own] - some.start, self.counts[own]
        of_segments = np.bincount(segment, counts, some.stop - some.start).astype(np.int64)
        values = np.concatenate([row[:count] for row, count in zip(self._values[own], counts, strict=True)])
        before, total = np.zeros_like(of_segments), of_segments
        if self._ranks is not None:
            of_ranks = np.array(self._ranks.gather(of_segments))
            values = np.concatenate(pixels_of_segments(self._ranks.gather(values), of_ranks))
            before, total = of_ranks[: self._ranks.rank].sum(0), of_ranks.sum(0)
        edges = np.cumsum(np.append(0, total))
        begin = edges[:-1] + before - (np.cumsum(of_segments) - of_segments)
        self.first[own] = begin[segment] + np.cumsum(counts) - counts
        return values, edges
