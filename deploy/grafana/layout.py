"""A dashboard as Grafana's JSON: where each panel is, and how it is drawn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from deploy.grafana.panels import Panel, Sections, Table

WIDTH, HEIGHT = 8, 8
COLUMNS = 24
TABLE_HEIGHT = 8
SOURCE = {"type": "prometheus", "uid": "${datasource}"}

CHOICE_OF_SOURCE = {
    "name": "datasource",
    "label": "data source",
    "type": "datasource",
    "query": "prometheus",
    "current": {"text": "Prometheus", "value": "prometheus"},
}


def choice(name: str, label: str, query: str) -> dict[str, Any]:
    """A variable; at first all of its values are selected."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": query,
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


SERVERS = choice("instance", "server", "label_values(lovasz_build_info, instance)")
CHOICE_OF_RUNS = choice("run", "run", "label_values(lovasz_run_loss, run)")


def dashboard(uid: str, title: str, sections: Sections, variables: Sequence[Any]) -> dict[str, Any]:
    return {
        "uid": uid,
        "title": title,
        "tags": ["lovasz"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "graphTooltip": 1,
        "links": [{"type": "dashboards", "tags": ["lovasz"], "title": "Lovász", "includeVars": True, "keepTime": True}],
        "templating": {"list": [CHOICE_OF_SOURCE, *variables]},
        "panels": list(_laid_out(sections)),
    }


def _laid_out(sections: Sections) -> Iterator[dict[str, Any]]:
    """The panels with their places: each section below its heading, tables over the whole width, plots side by side."""
    top, numbers = 0, itertools.count(1)
    for heading, panels in sections.items():
        place = {"x": 0, "y": top, "w": COLUMNS, "h": 1}
        yield {"id": next(numbers), "type": "row", "title": heading, "collapsed": False, "gridPos": place, "panels": []}
        top, left, height = top + 1, 0, 0
        for panel in panels:
            width = WIDTH if isinstance(panel, Panel) else COLUMNS
            if left + width > COLUMNS:
                top, left = top + height, 0
            height = HEIGHT if isinstance(panel, Panel) else TABLE_HEIGHT
            yield {
                "id": next(numbers),
                "title": panel.title,
                "description": panel.text,
                "datasource": SOURCE,
                "gridPos": {"x": left, "y": top, "w": width, "h": height},
                **(_plot(panel) if isinstance(panel, Panel) else _table(panel)),
            }
            left += width
        top += height


def _plot(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "custom": {"fillOpacity": 5}}
    if panel.stacked:
        defaults["custom"] = {"fillOpacity": 40, "stacking": {"mode": "normal"}}
    if panel.most is not None:
        defaults["max"] = panel.most
    return {
        "type": "timeseries",
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {**_target(place, expression), "legendFormat": legend, "exemplar": panel.exemplars}
            for place, (legend, expression) in enumerate(panel.series)
        ],
    }


def _table(table: Table) -> dict[str, Any]:
    together: dict[str, Any] = {"id": "merge", "options": {}}
    if table.matrix is not None:
        rows, columns = table.matrix
        options = {"rowField": rows, "columnField": columns, "valueField": "Value"}
        together = {"id": "groupingToMatrix", "options": options}
    order = {name: place for place, name in enumerate(table.headings)}
    organized = {"excludeByName": {"Time": True}, "indexByName": order, "renameByName": dict(table.headings)}
    return {
        "type": "table",
        "fieldConfig": {
            "defaults": {"noValue": table.empty},
            "overrides": [
                {"matcher": {"id": "byName", "options": heading}, "properties": [{"id": "unit", "value": unit}]}
                for heading, unit in table.unit.items()
            ],
        },
        "options": {"showHeader": True, "sortBy": [{"displayName": table.sorted_by, "desc": True}]},
        "targets": [
            {**_target(place, query), "format": "table", "instant": True} for place, query in enumerate(table.queries)
        ],
        "transformations": [together, {"id": "organize", "options": organized}],
    }


def _target(place: int, expression: str) -> dict[str, Any]:
    return {"refId": chr(ord("A") + place), "datasource": SOURCE, "expr": expression}
