"""The rules, the dashboard and docs/operations.md agree. tests/e2e/test_monitoring.py runs them on data."""

from __future__ import annotations

import json
import re
import runpy
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.support import documents
from tests.support.documents import ROOT, name

PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
PAGE = ROOT / "docs" / "operations.md"
BOARD = json.loads((GRAFANA / "dashboards" / "xgen-proxy.json").read_text())
ROWS = [panel for panel in BOARD["panels"] if panel["type"] == "row"]
SHOWN = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
PANELS = [*SHOWN, *(panel for row in ROWS for panel in row.get("panels") or ())]
CASES = sorted((PROMETHEUS / "tests").glob("*.yml"))


def rules() -> list[dict[str, Any]]:
    files = sorted((PROMETHEUS / "rules").glob("*.yml"))
    return [rule for file in files for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


ALERTS = [rule for rule in rules() if "alert" in rule]
alerts = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
panels = pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])


# Alerts


def test_the_page_lists_every_alert() -> None:
    section = PAGE.read_text().partition("\n## Alerts\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^### (\w+)\n\n\*(critical|warning)\.\*", section, re.MULTILINE)
    assert sorted(listed) == sorted((alert["alert"], alert["labels"]["severity"]) for alert in ALERTS)


@alerts
def test_alerts_have_a_description_and_a_runbook(alert: dict[str, Any]) -> None:
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    assert (ROOT / page) == PAGE
    assert anchor in documents.anchors(PAGE)
    assert anchor == alert["alert"].lower()


def test_every_alert_is_tested_firing_and_silent() -> None:
    seen: dict[str, set[bool]] = defaultdict(set)
    for file in CASES:
        for case in yaml.safe_load(file.read_text())["tests"]:
            for check in case.get("alert_rule_test", []):
                seen[check["alertname"]].add(bool(check["exp_alerts"]))
    assert seen == {alert["alert"]: {True, False} for alert in ALERTS}


# The dashboard


def test_the_dashboard_is_up_to_date() -> None:
    made = runpy.run_path(str(GRAFANA / "dashboard.py"))
    assert made["render"]() == made["FILE"].read_text(), "stale: run python deploy/grafana/dashboard.py"


def test_the_sdk_knows_every_field_of_the_dashboard() -> None:
    """A field that Grafana does not know would be lost in the SDK's model."""
    register_default_plugins()
    assert lost(BOARD, json.loads(JSONEncoder().encode(Dashboard.from_json(BOARD)))) == []


def lost(part: Any, whole: Any, path: str = "") -> list[str]:
    """Paths at which `whole`, which may have more fields, differs from `part`."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return [each for key, value in part.items() for each in lost(value, whole.get(key), f"{path}.{key}")]
    if isinstance(part, list) and isinstance(whole, list) and len(part) == len(whole):
        return [each for i, (a, b) in enumerate(zip(part, whole, strict=True)) for each in lost(a, b, f"{path}[{i}]")]
    return [] if part == whole else [path]


def test_one_screen_with_four_questions_and_a_closed_fifth() -> None:
    titles = [row["title"] for row in ROWS]
    assert [bool(row.get("collapsed")) for row in ROWS] == [False] * 4 + [True]
    assert all(title.endswith("?") for title in titles)
    assert all(f"| {title} |" in PAGE.read_text() for title in titles)
    assert len(SHOWN) <= 16
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in BOARD["panels"])
    assert bottom * 38 < 1080, "a unit of the grid is 38 pixels with its gap"
    numbers = [panel["id"] for panel in [*ROWS, *PANELS]]
    assert len(set(numbers)) == len(numbers)


@panels
def test_panels_have_descriptions_and_units(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert panel["title"] in PAGE.read_text().replace("\n", " ")
    if panel["type"] == "timeseries":
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["options"]["legend"]["showLegend"]
    for target in panel["targets"]:
        assert target.get("legendFormat") or panel["type"] == "table"
        assert target["datasource"]["uid"] == "${datasource}"


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    [source] = provisioned("datasources")["datasources"]
    [provider] = provisioned("dashboards")["providers"]
    scraped = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["global"]["scrape_interval"]
    assert (source["type"], source["isDefault"], source["jsonData"]["timeInterval"]) == ("prometheus", True, scraped)
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"


def provisioned(kind: str) -> dict[str, Any]:
    [file] = (GRAFANA / "provisioning" / kind).glob("*.yml")
    found: dict[str, Any] = yaml.safe_load(file.read_text())
    return found


# Metrics


def expressions() -> list[str]:
    return [rule["expr"] for rule in rules()] + [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_every_queried_metric_exists() -> None:
    rows = documents.table_rows(ROOT / "docs" / "metrics.md", "metric")
    documented = {metric for row in rows for metric in documents.ticked(row[0])}
    asked = {found for expr in expressions() for found in re.findall(r"(?<![\w:])xgen_\w+", expr)}
    assert {re.sub(r"_(bucket|count|sum)$", "", metric) for metric in asked} <= documented


def test_every_recorded_series_exists_and_is_used() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    asked = {found for expr in expressions() for found in re.findall(r"(?<![\w:])\w+:xgen_\w+:\w+|xgen:\w+:\w+", expr)}
    assert asked <= recorded
    assert recorded - asked == {"backend:xgen_requests:share_rate5m"}


@pytest.mark.parametrize("file", [*PROMETHEUS.rglob("*.yml"), *GRAFANA.rglob("*.yml")], ids=name)
def test_files_are_yaml(file: Path) -> None:
    assert yaml.safe_load(file.read_text())
