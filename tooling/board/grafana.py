"""A board as Grafana's JSON. Knows Grafana's form and nothing of what is shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from board.panel import Board, Kind, Panel
from board.variable import SOURCE
from microserve.protocol.metrics.table import engine, index, router

SCHEMA_VERSION = 39
"""Grafana 11 and later take it as it is; 10 takes it too."""
FROM_SOURCE = {"type": "prometheus", "uid": f"${{{SOURCE}}}"}
ROW_HEIGHT = {Kind.LINES: 8, Kind.NUMBER: 4}
WIDTH = 24
CHANGED = f'sum(changes({index.CONTROL_VERSION.name}{{job=~"$job"}}[1m])) > 0'
"""A mark on every chart where strategies or labels were changed."""


def text_of(board: Board) -> str:
    return json.dumps(dashboard(board), indent=2, ensure_ascii=False) + "\n"


def dashboard(board: Board) -> dict[str, Any]:
    return {
        "annotations": {"list": [_changes()]},
        "description": board.says,
        "editable": True,
        "fiscalYearStartMonth": 0,
        "graphTooltip": 1,
        "links": [_link()],
        "panels": list(_panels(board)),
        "refresh": "10s",
        "schemaVersion": SCHEMA_VERSION,
        "tags": ["microserve"],
        "templating": {"list": _variables(board)},
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "title": board.title,
        "uid": board.uid,
        "version": 1,
    }


def _variables(board: Board) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {
            "current": {},
            "hide": 0,
            "label": "Data source",
            "name": SOURCE,
            "options": [],
            "query": "prometheus",
            "refresh": 1,
            "regex": "",
            "type": "datasource",
        },
        _variable("job", "Mesh", f"label_values({index.INFO.name}, job)"),
    ]
    if board.by_strategy:
        of_mesh = f'{router.VERSIONS.name}{{job=~"$job"}}'
        return [*found, _variable("strategy", "Strategy", f"label_values({of_mesh}, strategy)")]
    of_mesh = f'{engine.RUNNING.name}{{job=~"$job"}}'
    of_model = f'{engine.RUNNING.name}{{job=~"$job", model_name=~"$model_name"}}'
    return [
        *found,
        _variable("model_name", "Model", f"label_values({of_mesh}, model_name)"),
        _variable("engine", "Engine", f"label_values({of_model}, engine)"),
    ]


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "datasource": FROM_SOURCE,
        "hide": 0,
        "includeAll": True,
        "label": label,
        "multi": True,
        "name": name,
        "options": [],
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "regex": "",
        "skipUrlSync": False,
        "sort": 1,
        "type": "query",
    }


def _changes() -> dict[str, Any]:
    return {
        "datasource": FROM_SOURCE,
        "enable": True,
        "expr": CHANGED,
        "hide": False,
        "iconColor": "blue",
        "name": "Strategies or labels changed",
    }


def _link() -> dict[str, Any]:
    return {
        "asDropdown": False,
        "icon": "external link",
        "includeVars": True,
        "keepTime": True,
        "tags": ["microserve"],
        "targetBlank": False,
        "title": "MicroServe",
        "tooltip": "",
        "type": "dashboards",
        "url": "",
    }


def _panels(board: Board) -> Iterator[dict[str, Any]]:
    number, top = 0, 0
    for row in board.rows:
        number += 1
        yield {
            "collapsed": False,
            "gridPos": {"h": 1, "w": WIDTH, "x": 0, "y": top},
            "id": number,
            "panels": [],
            "title": row.title,
            "type": "row",
        }
        top, left, height = top + 1, 0, 0
        for panel in row.panels:
            if left + panel.width > WIDTH:
                top, left = top + height, 0
            height = ROW_HEIGHT[panel.kind]
            number += 1
            place = {"h": height, "w": panel.width, "x": left, "y": top}
            yield _panel(panel, number, place)
            left += panel.width
        top += height


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "color": {"mode": "palette-classic" if panel.kind is Kind.LINES else "thresholds"},
        "mappings": [],
        "min": 0,
        "thresholds": _thresholds(panel),
        "unit": panel.unit.value,
    }
    if panel.kind is Kind.LINES:
        defaults["custom"] = _line_style(stacked=panel.stacked)
    if waits := sorted({query.empty_until for query in panel.queries if query.empty_until}):
        defaults["noValue"] = f"nothing, until {' and '.join(waits)}"
    return {
        "datasource": FROM_SOURCE,
        "description": panel.says,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "gridPos": place,
        "id": number,
        "options": _options(panel.kind),
        "targets": [
            {
                "datasource": FROM_SOURCE,
                "editorMode": "code",
                "expr": query.expression,
                "instant": False,
                "legendFormat": query.legend,
                "range": True,
                "refId": "ABCDEFGH"[place_of],
            }
            for place_of, query in enumerate(panel.queries)
        ],
        "title": panel.title,
        "type": panel.kind.value,
    }


def _thresholds(panel: Panel) -> dict[str, Any]:
    if panel.bad_below is not None:
        steps = [{"color": "red", "value": None}, {"color": "green", "value": panel.bad_below}]
    else:
        steps = [{"color": "green", "value": None}]
        if panel.bad_from is not None:
            steps.append({"color": "red", "value": panel.bad_from})
    return {"mode": "absolute", "steps": steps}


def _line_style(*, stacked: bool) -> dict[str, Any]:
    return {
        "drawStyle": "line",
        "fillOpacity": 30 if stacked else 0,
        "lineInterpolation": "linear",
        "lineWidth": 1,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"group": "A", "mode": "normal" if stacked else "none"},
    }


def _options(kind: Kind) -> dict[str, Any]:
    if kind is Kind.NUMBER:
        return {
            "colorMode": "value",
            "graphMode": "area",
            "justifyMode": "auto",
            "orientation": "auto",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "textMode": "value",
        }
    return {
        "legend": {
            "calcs": ["mean", "max"],
            "displayMode": "table",
            "placement": "bottom",
            "showLegend": True,
        },
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
