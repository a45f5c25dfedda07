"""The results of the benchmark: parts, each a table for the docs and an entry of the JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CORE = "lovasz.core, float32 logits"
"""The contender whose time is subtracted from a remote call's, which leaves the transport's."""


@dataclass(frozen=True)
class Column:
    """A column of a table: the key of its values in the rows, and their format."""

    key: str
    heading: str
    format: str

    def cell(self, row: Mapping[str, Any]) -> str:
        value = row[self.key]
        return "" if value is None else format(value, self.format)


@dataclass(frozen=True)
class Part:
    """One table.

    Attributes:
        note: what its numbers mean.
        rows: may have more values than there are columns; the JSON has all of them.
        more: further values for the JSON.
    """

    key: str
    title: str
    note: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    more: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {"title": self.title, "note": self.note, "rows": list(self.rows), **self.more}


def markdown(part: Part) -> str:
    lines = [
        "| " + " | ".join(column.heading for column in part.columns) + " |",
        "|" + "|".join("---:" if column.format else "---" for column in part.columns) + "|",
        *("| " + " | ".join(column.cell(row) for column in part.columns) + " |" for row in part.rows),
    ]
    return "\n".join(["", f"### {part.title}", "", part.note, "", *lines])
