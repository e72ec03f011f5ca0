"""The dashboard asks for what a server tells, and every panel says what it shows."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.bundle import ServedModel
from serve.pb.limelight.v1 import limelight_pb2 as pb
from tests.serve.running import PATIENCE, generate, serving, stream
from tests.serve.scraping import families
from tests.serve.test_status import failed

REPOSITORY = Path(__file__).parents[2]
DASHBOARD = json.loads((REPOSITORY / "deploy" / "grafana" / "limelight.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}

SELECTED = re.compile(r"(\w+)\{([^}]*)\}")
"""A metric and its label matchers; the dashboard never asks for a metric without any."""

SCRAPED = {"job", "instance"}
"""Labels that Prometheus adds."""


def test_every_metric_is_followed_by_its_matchers() -> None:
    for query in QUERIES:
        without = re.sub(r'"[^"]*"', "", query)
        assert set(re.findall(r"\b(?:limelight|process)_\w+", without)) == {name for name, _ in SELECTED.findall(query)}


@pytest.fixture(scope="module")
def told(served: ServedModel) -> dict[str, set[str]]:
    """Labels of every sample that a server tells which has answered some calls."""
    found: dict[str, set[str]] = {}
    with serving(served, metrics_port=0) as running:
        assert generate(running.stub, "ab").result(PATIENCE).hypotheses
        assert list(stream(running.stub, "abc"))
        assert failed(generate(running.stub, ""))
        item = pb.GenerateManyRequest(request=pb.GenerateRequest(source="ab"))
        assert list(running.stub.GenerateMany(iter([item]), timeout=PATIENCE))
        running.until_idle()
        for sample in (sample for family in families(running) for sample in family.samples):
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("query", QUERIES)
def test_what_is_asked_for_is_told(told: dict[str, set[str]], query: str) -> None:
    asked = SELECTED.findall(query)
    assert asked
    by = {label for labels in re.findall(r"by \(([^)]*)\)", query) for label in re.split(r", *", labels)}
    known = set[str]()
    for name, matchers in asked:
        assert name in told
        labels = set(re.findall(r'(\w+)(?:=~|!~|!=|=)"', matchers))
        assert labels >= SCRAPED
        assert labels <= told[name] | SCRAPED
        known |= told[name] | SCRAPED
    assert by <= known


def test_variables_ask_for_what_is_told(told: dict[str, set[str]]) -> None:
    queries = [variable["query"]["query"] for variable in VARIABLES.values() if variable["type"] == "query"]
    names = {name for query in queries for name in re.findall(r"label_values\((\w+)", query)}
    assert names == {"limelight_model_info"}
    assert names <= told.keys()


def test_it_is_of_a_known_schema_and_of_any_prometheus() -> None:
    assert DASHBOARD["schemaVersion"] >= 39
    assert DASHBOARD["id"] is None
    datasource = VARIABLES["datasource"]
    assert (datasource["type"], datasource["query"]) == ("datasource", "prometheus")
    sources = [panel["datasource"] for panel in PANELS]
    sources += [target["datasource"] for panel in PANELS for target in panel["targets"]]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_panel_says_what_it_shows(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert all(target["legendFormat"] for target in panel["targets"])


def test_panels_are_told_apart() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    titles = [panel["title"] for panel in PANELS]
    assert len(set(titles)) == len(titles)
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Traffic", "Latency", "Engine", "Saturation", "Errors", "Memory"]


def _cells(panel: dict[str, Any]) -> Iterator[tuple[int, int]]:
    place = panel["gridPos"]
    for x in range(place["x"], place["x"] + place["w"]):
        yield from ((x, y) for y in range(place["y"], place["y"] + place["h"]))


def test_panels_do_not_overlap() -> None:
    cells = [cell for panel in DASHBOARD["panels"] for cell in _cells(panel)]
    assert len(set(cells)) == len(cells)
    assert all(0 <= x < 24 for x, _ in cells)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_understands_every_query(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": query.replace("$__rate_interval", "5m")}
        for number, query in enumerate(QUERIES)
    ]
    path = tmp_path / "rules.json"  # JSON is YAML
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    checked = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert f"{len(QUERIES)} rules found" in checked.stdout


def test_every_metric_is_documented(told: dict[str, set[str]]) -> None:
    """And nothing else is: by the names that samples have, less what a histogram adds."""
    text = (REPOSITORY / "docs" / "observability.md").read_text(encoding="utf-8")
    table = set(re.findall(r"^\| `((?:limelight|process)_\w+)`", text, re.MULTILINE))
    histograms = {name.removesuffix("_bucket") for name in told if name.endswith("_bucket")}
    added = {f"{name}_{suffix}" for name in histograms for suffix in ("bucket", "sum", "count", "created")}
    samples = {name for name in told if not name.endswith("_created")} - added
    assert table == samples | histograms
