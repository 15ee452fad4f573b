"""What docker/grafana promises by itself, without InfluxDB: names that match, texts that help."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from socs_monitor.feeds.statistics import FIELDS
from tests.grafana import DASHBOARD, DATASOURCE, PANEL_QUERIES, PANELS, RULE_QUERIES, RULES, VARIABLE, Query

# A register of the streamer, as it is on a stream's feed of metadata.
OPEN = "AMCcSmurfProcessorSOStreamopen_g3stream"


def title(panel: dict[str, Any]) -> str:
    return str(panel["title"])


def uid(rule: dict[str, Any]) -> str:
    return str(rule["uid"])


def test_links_to_the_dashboard_stay_valid() -> None:
    assert DASHBOARD["uid"] == "pysmurf-monitor"
    assert "id" not in DASHBOARD


def test_panels_are_told_apart() -> None:
    assert len({panel["id"] for panel in PANELS}) == len({panel["title"] for panel in PANELS}) == len(PANELS)


def test_no_two_panels_overlap_and_none_is_cut_off() -> None:
    for panel in PANELS:
        grid = panel["gridPos"]
        assert grid["x"] >= 0, title(panel)
        assert grid["x"] + grid["w"] <= 24, title(panel)
    for one, other in itertools.combinations(PANELS, 2):
        a, b = one["gridPos"], other["gridPos"]
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above, f"{title(one)} covers {title(other)}"


def test_all_is_asked_of_the_provisioned_datasource() -> None:
    asked = [panel["datasource"] for panel in PANELS] + [VARIABLE["datasource"]]
    assert all(source == {"type": DATASOURCE["type"], "uid": DATASOURCE["uid"]} for source in asked)
    assert {data["datasourceUid"] for rule in RULES for data in rule["data"]} == {DATASOURCE["uid"], "__expr__"}


@pytest.mark.parametrize("panel", PANELS, ids=title)
def test_a_panel_says_what_it_shows(panel: dict[str, Any]) -> None:
    assert len(panel["description"]) > 80


@pytest.mark.parametrize("rule", RULES, ids=uid)
def test_an_alert_says_what_to_do(rule: dict[str, Any]) -> None:
    description = rule["annotations"]["description"]
    for part in ("What happened: ", "What it means: ", "What to do: ", "Which agent: {{ $value }}"):
        assert part in description
    assert rule["annotations"]["summary"]
    assert rule["labels"]["severity"] in ("critical", "warning")


@pytest.mark.parametrize("rule", RULES, ids=uid)
def test_an_alert_is_about_its_query_and_leads_to_a_panel(rule: dict[str, Any]) -> None:
    assert rule.keys() == {
        *("uid", "title", "condition", "for", "noDataState", "execErrState", "dashboardUid", "panelId"),
        *("labels", "annotations", "data"),
    }, "Grafana passes over what it does not know"
    query, expression = rule["data"]
    assert query["model"]["refId"] == query["refId"]
    assert expression["model"]["refId"] == expression["refId"] == rule["condition"]
    (condition,) = expression["model"]["conditions"]
    assert condition["query"]["params"] == [query["refId"]]
    assert rule["dashboardUid"] == DASHBOARD["uid"]
    assert rule["panelId"] in {panel["id"] for panel in PANELS}


@pytest.mark.parametrize("query", PANEL_QUERIES + RULE_QUERIES, ids=str)
def test_what_is_asked_for_is_what_the_agent_publishes(query: Query) -> None:
    assert query.fields <= {*FIELDS, OPEN}
    assert query.fields or "(/^registered_/)" in query.text


def test_only_the_rule_about_silence_speaks_when_there_is_no_data() -> None:
    speaks = {rule["uid"]: (rule["noDataState"], rule["execErrState"]) for rule in RULES}
    assert speaks.pop("pysmurf-monitor-silent") == ("Alerting", "Alerting")
    assert set(speaks.values()) == {("OK", "OK")}


@pytest.mark.parametrize("query", PANEL_QUERIES, ids=str)
def test_grafana_does_not_take_the_agent_for_part_of_a_regex(query: Query) -> None:
    # between two slashes it escapes the variable's dots, which InfluxQL does not take in a quoted name
    before, variable, after = query.text.partition("$agent")
    assert not (variable and "/" in before and "/" in after)


@pytest.mark.parametrize("query", RULE_QUERIES, ids=str)
def test_an_alert_names_its_agents(query: Query) -> None:
    assert query.alias == "$m"
    assert "FROM /.*/" in query.text
