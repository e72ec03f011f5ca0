"""The alerts ask for what a server tells, each is tried, and says what to do."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "deploy" / "prometheus"
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
TRIED: list[dict[str, Any]] = yaml.safe_load((FOLDER / "alerts_test.yaml").read_text(encoding="utf-8"))["tests"]

WITH_TLS = "limelight_certificate_seconds_left"
"""Told only where there is a certificate, so not in the table of what every server tells."""


def metrics(text: str) -> set[str]:
    """That a query names, as the documentation has them."""
    return {name.removesuffix("_bucket") for name in re.findall(r"\b(?:limelight|process)_\w+", text)}


def documented() -> set[str]:
    """What the table in docs/observability.md has, which is what a server tells: test_dashboard sees to that."""
    text = (REPOSITORY / "docs" / "observability.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| `((?:limelight|process)_\w+)`", text, re.MULTILINE))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_what_is_told_and_says_what_to_do(rule: dict[str, Any]) -> None:
    assert metrics(rule["expr"]) <= documented() | {WITH_TLS}
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert "{{ $labels.instance }}" in rule["annotations"]["summary"]
    assert rule["annotations"]["description"].endswith(".")


def test_every_alert_is_tried() -> None:
    """That what is tried is right, promtool says below; that nothing is left out, this does."""
    well, wrong = TRIED
    fired = re.findall(r'alertname="(\w+)"', wrong["promql_expr_test"][-1]["exp_samples"].__repr__())
    assert set(fired) == {rule["alert"] for rule in RULES}
    given = {name for series in well["input_series"] for name in metrics(series["series"])}
    assert given >= {name for rule in RULES for name in metrics(rule["expr"])}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize(("command", "file"), [("check", "alerts.yaml"), ("test", "alerts_test.yaml")])
def test_promtool_says_that_they_fire_where_they_should(command: str, file: str) -> None:
    done = subprocess.run(["promtool", command, "rules", FOLDER / file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
