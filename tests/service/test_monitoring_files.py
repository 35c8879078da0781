"""deploy/prometheus and deploy/grafana: what they ask for exists, and each alert rings when it should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from service_helpers import ROOT, post
from starlette.testclient import TestClient

PROMETHEUS, GRAFANA = ROOT / "deploy" / "prometheus", ROOT / "deploy" / "grafana"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))

_METRIC = re.compile(r"(?<![:\w$\"])(?:mithridate|process)_[a-z0-9_]+(?![:\w])")


def promtool(*arguments: str) -> None:
    tool = shutil.which("promtool")
    if tool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    found = subprocess.run([tool, *arguments], cwd=PROMETHEUS, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_prometheus_takes_configuration_and_rules() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "rules.yml")


def test_each_alert_rings_when_it_should() -> None:
    promtool("test", "rules", "rules_test.yml")


def alerts() -> dict[str, str]:
    rules = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())
    return {rule.get("alert", rule.get("record")): rule["expr"] for group in rules["groups"] for rule in group["rules"]}


def test_each_alert_is_tried_and_explained() -> None:
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    rung = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    named = {name for name in alerts() if name.startswith("Mithridate")}
    assert rung == named
    explained = (ROOT / "docs" / "watching.md").read_text()
    assert [name for name in named if f"`{name}`" not in explained] == []


def dashboard_expressions(path: Path) -> list[str]:
    dashboard = json.loads(path.read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert all(panel["targets"] for panel in panels)
    variables = [str(variable["definition"]) for variable in dashboard["templating"]["list"]]
    return [target["expr"] for panel in panels for target in panel["targets"]] + variables


@pytest.fixture(scope="module")
def families(client: TestClient, clean: list[bytes]) -> dict[str, set[str]]:
    """Every name that a query may use, with the labels it has."""
    post(client, clean[0])
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        found[family.name] = set()
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def check(expression: str, families: dict[str, set[str]]) -> None:
    names = _METRIC.findall(expression)
    assert names
    unknown = [name for name in names if name not in families]
    assert unknown == [], f"/metrics has no {unknown}: {expression}"
    for name, matchers in re.findall(r"(\w+)\{([^}]*)\}", expression):
        labels = set(re.findall(r"(\w+)=~?\"", matchers)) - {"job", "instance"}
        assert labels <= families[name], f"{name} has no label {labels - families[name]}"


def test_what_the_rules_ask_for_is_there(families: dict[str, set[str]]) -> None:
    for expression in alerts().values():
        if "mithridate_" in expression:
            check(expression, families)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_what_the_dashboard_asks_for_is_there(path: Path, families: dict[str, set[str]]) -> None:
    for expression in dashboard_expressions(path):
        check(expression, families)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_prometheus_understands_the_dashboard(path: Path, tmp_path: Path) -> None:
    """Each panel as a rule: promtool reads the language, this test does not."""
    filled = [
        re.sub(r"\$__rate_interval", "5m", expression)
        for expression in dashboard_expressions(path)
        if not expression.startswith("label_values")
    ]
    rules: Any = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(filled)]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", str(tmp_path / "panels.yml"))


def test_grafana_finds_its_data_and_its_dashboards() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/mithridate.yml").read_text())["providers"]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for service in ("prometheus", "grafana"):
        assert compose[service]["profiles"] == ["watch"]
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", compose[service]["image"]), "a version, not latest"
        for volume in compose[service]["volumes"]:
            if volume.startswith("./"):
                assert (ROOT / volume.split(":")[0]).is_dir()
    targets = {volume.split(":")[1]: ROOT / volume.split(":")[0] for volume in compose["grafana"]["volumes"]}
    assert targets[provider["options"]["path"]] == GRAFANA / "dashboards"
    for path in DASHBOARDS:
        uids = set(re.findall(r'"uid": "(mithridate-prometheus|[^"]*)"', path.read_text()))
        assert uids == {source["uid"], "mithridate"}
