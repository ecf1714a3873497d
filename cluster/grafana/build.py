"""A dashboard of panels, as the JSON that Grafana imports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SCHEMA_VERSION = 41
"""Grafana 12's; newer ones convert it."""
WIDTH = 24
"""Columns of Grafana's grid."""
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture."""

    title: str
    description: str
    unit: str
    """Grafana's name of it, such as `s`, `percentunit` or `reqps`."""
    queries: Mapping[str, str]
    """PromQL by legend. `$__rate_interval` and `$model_name` stand for what the viewer chose."""
    kind: str = "timeseries"
    """Or `stat`, `heatmap`, `table`."""
    stacked: bool = False
    most: float | None = None
    """Upper end of the axis."""
    width: int = 8


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: tuple[Panel, ...]


def dashboard(uid: str, title: str, description: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The dashboard, with its rows from top to bottom and their panels from left to right."""
    panels: list[dict[str, Any]] = []
    top = 0
    for row in rows:
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": row.title, "collapsed": False, "panels": []}
            | {"gridPos": {"x": 0, "y": top, "w": WIDTH, "h": 1}}
        )
        left, top, height = 0, top + 1, 0
        for panel in row.panels:
            if left + panel.width > WIDTH:
                left, top = 0, top + height
            height = 4 if panel.kind == "stat" else 8
            place = {"x": left, "y": top, "w": panel.width, "h": height}
            panels.append(_panel(panel) | {"id": len(panels) + 1, "gridPos": place})
            left += panel.width
        top += height
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["qwen3-serve"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "annotations": {"list": []},
        "templating": {"list": [_datasource_choice(), _model_choice()]},
        "panels": panels,
    }


def _panel(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.most is not None:
        defaults["max"] = panel.most
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        defaults["custom"] = {"fillOpacity": 30 if panel.stacked else 5, "stacking": stacking, "showPoints": "never"}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "targets": [_target(panel.kind, *query, chr(ord("A") + i)) for i, query in enumerate(panel.queries.items())],
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _options(panel.kind),
    }


def _target(kind: str, legend: str, expression: str, ref_id: str) -> dict[str, Any]:
    target: dict[str, Any] = {"refId": ref_id, "expr": expression, "legendFormat": legend, "datasource": DATASOURCE}
    if kind == "heatmap":
        target["format"] = "heatmap"
    elif kind == "table":
        target |= {"format": "table", "instant": True}
    return target


def _options(kind: str) -> dict[str, Any]:
    if kind == "stat":
        return {"reduceOptions": {"calcs": ["lastNotNull"], "values": False}, "colorMode": "value", "graphMode": "area"}
    if kind == "heatmap":
        return {"calculate": False, "cellGap": 1, "color": {"mode": "scheme", "scheme": "Blues", "steps": 64}}
    if kind == "table":
        return {"showHeader": True}
    return {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }


def _datasource_choice() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _model_choice() -> dict[str, Any]:
    return {
        "name": "model_name",
        "label": "Model",
        "type": "query",
        "datasource": DATASOURCE,
        "query": "label_values(qwen3_slo_target_ratio, model_name)",
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }
