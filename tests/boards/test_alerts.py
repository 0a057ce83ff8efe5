"""Prometheus' own tool finds scrape.yml and alerts.yml in order, and each alert fires when it must and not
else."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.boards.alert_cases import CASES, AlertCase
from tests.support.boards.prometheus import DEPLOY, promtool
from tests.test_packaging import ROOT

RULES: list[dict[str, Any]] = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"][0]["rules"]
PAGE = (ROOT / "docs/operations.md").read_text()
LONG = "20m"
"""After so long each of them has fired."""


def scrapes(*marks: str) -> str:
    """scrape.yml with those parts that are comments in it."""
    text = (DEPLOY / "scrape.yml").read_text()
    return re.sub("|".join(f"#{mark}# ?" for mark in marks), "", text) if marks else text


@pytest.mark.parametrize("marks", [(), ("key",), ("key", "static")])
def test_a_scrape_is_in_order_with_and_without_what_is_a_comment(
    tmp_path: Path, marks: tuple[str, ...]
) -> None:
    folder = tmp_path / "deploy/prometheus"
    folder.mkdir(parents=True)
    shutil.copy(DEPLOY / "alerts.yml", folder)
    (folder / "microserve.key").write_text("an operator's key")
    (folder / "scrape.yml").write_text(scrapes(*marks))
    (tmp_path / ".microserve").mkdir()
    target = [{"targets": ["127.0.0.1:7200"], "labels": {"service": "engine", "id": "e0"}}]
    (tmp_path / ".microserve/targets.json").write_text(json.dumps(target))
    done = promtool("check", "config", folder / "scrape.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    assert f"{len(RULES)} rules found" in done.stdout


def test_rules_are_in_order() -> None:
    done = promtool("check", "rules", DEPLOY / "alerts.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def case_of(case: AlertCase, rule: dict[str, Any]) -> list[dict[str, Any]]:
    """As promtool reads it: it fires after a while, not at once, and for nothing that is quiet."""
    labels = {"job": "microserve", **case.labels, **rule["labels"]}
    fired = {"exp_labels": labels, "exp_annotations": {**rule["annotations"], "summary": case.summary}}
    return [
        {
            "name": f"{case.alert} {number}",
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "alert_rule_test": [
                {"eval_time": "0m", "alertname": case.alert, "exp_alerts": []},
                {"eval_time": LONG, "alertname": case.alert, "exp_alerts": expected},
            ],
        }
        for number, (series, expected) in enumerate(
            [(case.series, [fired]), *((quiet, []) for quiet in case.quiet)]
        )
    ]


def test_each_alert_fires_when_it_must_and_not_else(tmp_path: Path) -> None:
    rules = {rule["alert"]: rule for rule in RULES}
    assert rules.keys() == {case.alert for case in CASES}
    tests = [test for case in CASES for test in case_of(case, rules[case.alert])]
    # JSON is YAML.
    (tmp_path / "tests.json").write_text(
        json.dumps({"rule_files": [str(DEPLOY / "alerts.yml")], "tests": tests})
    )
    done = promtool("test", "rules", tmp_path / "tests.json")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_an_alert_says_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert re.fullmatch(r"[1-9]\d*m", rule["for"])
    assert re.search(r": microserve (doctor|ps|tail|top|strategy)\b", rule["annotations"]["summary"])
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert page == "docs/operations.md"
    assert anchor in [heading.lower() for heading in re.findall(r"^#### (\w+)$", PAGE, re.M)]
