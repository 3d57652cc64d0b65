"""Grafana's JSON of panels and dashboards, from what differs between them."""

from dataclasses import dataclass
from typing import Any, Final, Literal

Json = dict[str, Any]
Kind = Literal["timeseries", "stat", "table"]

WIDTH: Final = 24  # of a dashboard, in Grafana's units
SIZES: Final[dict[Kind, tuple[int, int]]] = {"timeseries": (8, 7), "stat": (4, 4), "table": (12, 8)}
PROMETHEUS: Final = {"type": "prometheus", "uid": "${prometheus}"}
CLICKHOUSE: Final = {"type": "grafana-clickhouse-datasource", "uid": "${clickhouse}"}
AS_TABLE: Final = 1  # `format` of a query of the ClickHouse data source


@dataclass(frozen=True, slots=True)
class Panel:
    """``queries``: PromQL with the legend of its series, or SQL without one. ``unit``: Grafana's name of it."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "none"
    kind: Kind = "timeseries"
    about: str = ""
    stacked: bool = False

    @property
    def in_sql(self) -> bool:
        return self.kind == "table"

    def to_json(self, number: int, x: int, y: int) -> Json:
        width, height = SIZES[self.kind]
        source = CLICKHOUSE if self.in_sql else PROMETHEUS
        defaults: Json = {"unit": self.unit}
        if self.stacked:
            defaults["custom"] = {"fillOpacity": 30, "stacking": {"group": "A", "mode": "normal"}}
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.about,
            "datasource": source,
            "gridPos": {"x": x, "y": y, "w": width, "h": height},
            "targets": [self._target(n, query, legend) for n, (query, legend) in enumerate(self.queries)],
            "fieldConfig": {"defaults": defaults, "overrides": []},
            "options": OPTIONS[self.kind],
        }

    def _target(self, number: int, query: str, legend: str) -> Json:
        common: Json = {"refId": chr(ord("A") + number)}
        if self.in_sql:
            asked = {"editorType": "sql", "rawSql": query, "format": AS_TABLE, "queryType": "table"}
            return {**common, "datasource": CLICKHOUSE, **asked}
        return {**common, "datasource": PROMETHEUS, "expr": query, "legendFormat": legend, "range": True}


OPTIONS: Final[dict[Kind, Json]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "textMode": "auto",
    },
    "table": {"showHeader": True, "cellHeight": "sm"},
}


def data_source(name: str, label: str, plugin: str) -> Json:
    """The variable by which a dashboard's data source is chosen."""
    return {"type": "datasource", "name": name, "label": label, "query": plugin, "refresh": 1, **_ONE}


def choice(name: str, source: Json, query: Any) -> Json:
    """A variable with several values, those that ``query`` finds; all of them at first."""
    several = {"multi": True, "includeAll": True, "current": {"text": ["All"], "value": ["$__all"]}}
    return {"type": "query", "name": name, "label": name, "datasource": source, "query": query, "refresh": 2} | several


_ONE: Final[Json] = {"regex": "", "multi": False, "includeAll": False, "skipUrlSync": False}


def dashboard(
    uid: str, title: str, rows: dict[str, tuple[Panel, ...]], variables: list[Json], *, refresh: str = "10s"
) -> Json:
    """The whole dashboard. The panels of a row fill lines of `WIDTH` from the left."""
    panels: list[Json] = []
    y = 0
    for name, cells in rows.items():
        at = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": name, "collapsed": False, "gridPos": at, "panels": []}
        )
        y += 1
        x = height = 0
        for cell in cells:
            wide, high = SIZES[cell.kind]
            if x + wide > WIDTH:
                x, y, height = 0, y + height, 0
            panels.append(cell.to_json(len(panels) + 1, x, y))
            x, height = x + wide, max(height, high)
        y += height
    return {
        "uid": uid,
        "title": title,
        "tags": ["millstream"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # the crosshair is shared
        "refresh": refresh,
        "timezone": "browser",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "annotations": {"list": []},
        "links": [
            {
                "title": "Millstream",
                "type": "dashboards",
                "tags": ["millstream"],
                "asDropdown": False,
                "icon": "external link",
                "includeVars": True,
                "keepTime": True,
                "targetBlank": False,
                "tooltip": "",
                "url": "",
            }
        ],
        "panels": panels,
    }
