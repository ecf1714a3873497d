"""Dashboards, rules and their manual: made by the script, taken by Grafana and Prometheus, and agreeing on names."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from cluster.grafana.__main__ import FOLDER, dashboards, text
from serve_app.metrics.definitions import DEFINITIONS, PREFIX

ROOT = Path(__file__).parents[2]
RULES = ROOT / "cluster" / "prometheus" / "rules.yaml"
NAME = re.compile(rf"\b{PREFIX}[a-z0-9_]+\b")
SCHEMA = ROOT.parent / "shared" / "data" / "grafana" / "dashboard.jsonschema.json"


def base_name(name: str) -> str:
    """Of a series: what it is defined as."""
    for suffix in ("", "_bucket", "_sum", "_count"):
        short = name.removeprefix(PREFIX).removesuffix(suffix)
        if short in DEFINITIONS:
            return short
    return name


def used_names() -> set[str]:
    """What panels and rules ask for."""
    found = {name for file in FOLDER.glob("*.json") for name in NAME.findall(file.read_text())}
    return {base_name(name) for name in found | set(NAME.findall(RULES.read_text()))}


def test_panels_and_alerts_use_what_exists_and_all_that_exists():
    used = used_names()
    assert used <= set(DEFINITIONS)
    unused = {name for name, definition in DEFINITIONS.items() if definition.unused}
    assert used.isdisjoint(unused), "is used, and says that it is not"
    assert used | unused == set(DEFINITIONS), "is used nowhere, and does not say why"


def test_what_panels_use_of_the_rules_is_recorded():
    groups = yaml.safe_load(RULES.read_text())["groups"]
    recorded = {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}
    used = {name for file in FOLDER.glob("*.json") for name in re.findall(r"\bqwen3:[a-z0-9_:]+", file.read_text())}
    assert used <= recorded


def test_the_dashboards_are_what_the_script_makes():
    for name, found in dashboards().items():
        assert (FOLDER / name).read_text() == text(found), "run `python -m cluster.grafana`"


def test_every_panel_says_what_it_shows_and_none_covers_another():
    for found in dashboards().values():
        taken: set[tuple[int, int]] = set()
        for panel in found["panels"]:
            place = panel["gridPos"]
            cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
            assert taken.isdisjoint(cells) and place["x"] + place["w"] <= 24
            taken |= cells
            assert panel["type"] == "row" or panel["description"]


@pytest.mark.skipif(not SCHEMA.exists(), reason=f"{SCHEMA} is not there")
def test_grafanas_schema_takes_the_dashboards():
    validator = jsonschema.Draft7Validator(json.loads(SCHEMA.read_text()))
    for found in dashboards().values():
        assert [error.message for error in validator.iter_errors(found)] == []


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not on PATH")
def test_alerts_fire_when_they_should():
    command = ["promtool", "test", "rules", "rules_test.yaml"]
    done = subprocess.run(command, cwd=RULES.parent, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout


def test_every_alert_has_a_test_and_a_line_in_the_manual():
    groups = yaml.safe_load(RULES.read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    tests = yaml.safe_load(RULES.with_name("rules_test.yaml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    manual = (ROOT / "docs" / "metrics.md").read_text()
    assert alerts == fired
    assert {name for name in alerts if f"| `{name}` |" not in manual} == set()


def test_the_manual_names_every_metric_with_its_labels():
    rows = dict(re.findall(r"^\| `(qwen3_\w+)` \| [a-z]+ \| ([^|]*) \|", (ROOT / "docs/metrics.md").read_text(), re.M))
    assert rows == {each.full_name: ", ".join(f"`{label}`" for label in each.labels) for each in DEFINITIONS.values()}
