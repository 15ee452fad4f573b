"""docker/grafana as Grafana reads it: its panels, its alert rules, and their queries as InfluxDB gets them."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import yaml

from tests.testbed.processes import ROOT

FOLDER = ROOT / "docker" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboards" / "pysmurf-monitor.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
(VARIABLE,) = DASHBOARD["templating"]["list"]
(GROUP,) = yaml.safe_load((FOLDER / "provisioning" / "alerting" / "rules.yaml").read_text())["groups"]
RULES: list[dict[str, Any]] = GROUP["rules"]
(DATASOURCE,) = yaml.safe_load((FOLDER / "provisioning" / "datasources" / "influxdb.yaml").read_text())["datasources"]


class Query(NamedTuple):
    """A query of a panel or of an alert rule: whose it is, its name there, and what is written.

    `range_s` is the time that a rule looks back, None for a panel, which shows what the dashboard is set to.
    """

    owner: str
    name: str
    text: str
    alias: str
    range_s: int | None = None

    def sent(self, agent: str, begin: float, end: float, interval_s: int = 10) -> str:
        """The text that InfluxDB gets for a range of time (unix seconds), as Grafana makes it."""
        text = self.text.replace("$agent", agent)
        text = text.replace("$timeFilter", f"time >= {begin * 1e3:.0f}ms and time <= {end * 1e3:.0f}ms")
        text = text.replace("$__interval", f"{interval_s}s")
        assert not re.search(r"\$\w", text), f"Grafana knows no such variable: {text}"
        return text

    @property
    def fields(self) -> set[str]:
        """The fields that it asks for by name."""
        own = set(re.findall(r'AS "(\w+)"', self.text))
        return set(re.findall(r'"(\w+)"', self.text)) - {"feed"} - own

    def __str__(self) -> str:
        return f"{self.owner}: {self.name}"


def _of_rule(rule: dict[str, Any]) -> Query:
    data, _ = rule["data"]
    model = data["model"]
    return Query(rule["uid"], data["refId"], model["query"], model["alias"], data["relativeTimeRange"]["from"])


PANEL_QUERIES = [
    Query(panel["title"], target["alias"] or target["refId"], target["query"], target["alias"])
    for panel in PANELS
    for target in panel["targets"]
]
RULE_QUERIES = [_of_rule(rule) for rule in RULES]
