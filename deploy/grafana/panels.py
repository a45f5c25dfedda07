"""What a dashboard consists of: plots and tables, in sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Panel:
    """A plot over time.

    Attributes:
        text: the description, for people who know Prometheus but not the project.
        unit: the name of a Grafana unit.
        series: pairs of legend and expression.
        most: the upper end of the axis, if it is fixed.
        exemplars: whether traced requests are marked.
    """

    title: str
    text: str
    unit: str
    series: tuple[tuple[str, str], ...]
    stacked: bool = False
    most: int | None = None
    exemplars: bool = False


@dataclass(frozen=True)
class Table:
    """A table of current values, over the whole width.

    Attributes:
        queries: expressions whose results are merged into one table.
        headings: for each column from left to right, Grafana's name (a label, or the value of a query) and the heading.
        unit: the unit of a column, by its heading.
        empty: shown instead of a table without rows.
        matrix: for a table of a single query, the label of the rows and the label of the columns.
    """

    title: str
    text: str
    queries: tuple[str, ...]
    headings: Mapping[str, str]
    unit: Mapping[str, str]
    sorted_by: str
    empty: str
    matrix: tuple[str, str] | None = None


Sections = Mapping[str, Sequence[Panel | Table]]
