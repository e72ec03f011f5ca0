"""The table of docs/reliability.md is that of the JSON file, and says what was seen."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from bench.faults.case import Check, Finding, Verdict, verdict
from bench.faults.catalogue import FAULTS
from bench.faults.table import TITLES, about, cell, elsewhere, main, table, terminal
from bench.grid import BenchError
from tests.bench.test_summary import ROOT

WRONG, GRAVE = Check("is so", False, False, "is not"), Check("happens", True, False, "has happened")
WELL = Check("is well", False, True, "")


def row(*checks: Check, fault: int = 3, server: str = "limelight", **more: Any) -> dict[str, Any]:
    values = {
        "verdict": verdict(checks),
        "checks": [asdict(one) for one in checks],
        "statuses": {"OK": 2, "UNKNOWN": 1},
    }
    return asdict(Finding(**{"fault": fault, "server": server, **values, **more}))


def test_a_cell_says_what_is_otherwise_and_first_what_must_not_be() -> None:
    assert cell(row(WELL)) == "as expected (2 OK, UNKNOWN)"
    assert cell(row(WELL, statuses={})) == "as expected"
    assert cell(row(WRONG, WELL)) == "is not (2 OK, UNKNOWN)"
    assert cell(row(WRONG, GRAVE, WELL, GRAVE)) == "**has happened**; is not (2 OK, UNKNOWN)"
    assert cell(row(WELL, verdict=Verdict.INAPPLICABLE, reason="it has none")) == "- (it has none)"


def rows() -> list[dict[str, Any]]:
    checks = {"limelight": [WELL], "triton": [WRONG], "mlserver": [WRONG, GRAVE]}
    return [row(*checks[server], fault=fault.number, server=server) for fault in FAULTS for server in TITLES]


def test_a_line_for_each_fault_and_the_sums_of_the_verdicts() -> None:
    head, below, *lines = table(rows())
    assert head == "| fault | expected | Limelight | tritonserver 2.51 | MLServer 1.7.1 |"
    assert head.count("|") == below.count("|")
    assert len(lines) == len(FAULTS) + 6
    assert lines[0] == (
        "| 3. 4 MB of text | refused, nobody waits | as expected (2 OK, UNKNOWN) | is not (2 OK, UNKNOWN) "
        "| **has happened**; is not (2 OK, UNKNOWN) |"
    )
    count = len(FAULTS)
    assert lines[-3:] == [
        f"| as expected | {count} | 0 | 0 |",
        f"| otherwise | 0 | {count} | 0 |",
        f"| **what must not happen** | 0 | 0 | {count} |",
    ]
    assert terminal(rows()).row_count == len(FAULTS) * len(TITLES)


def test_a_fault_that_was_not_put_makes_no_table() -> None:
    found = rows()
    with pytest.raises(BenchError, match="fault 41 was not put to mlserver"):
        table(found[:-1])
    found[-1]["verdict"] = Verdict.FAILED
    with pytest.raises(BenchError, match="fault 41 was not put to mlserver"):
        table(found)


def test_where_it_was_run_and_what_was_not_stand_below() -> None:
    versions = {"limelight": {"grpcio": "1"}, "triton": {"nvidia-pytriton": "2"}, "mlserver": {"mlserver": "3"}}
    content = {"machine": {"cores": 2, "processor": "X"}, "commit": "abc", "versions": versions}
    assert about(content) == "Run at commit abc on 2 cores of an X, with grpcio 1, nvidia-pytriton 2, mlserver 3."
    assert "33 (it takes a hook inside the runtime)" in elsewhere()


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    """What is told of the faults is what was found."""
    app = Typer()
    app.command()(main)
    results, page = ROOT / "bench" / "results" / "faults.json", ROOT / "docs" / "reliability.md"
    assert CliRunner().invoke(app, ["--check", "--results", str(results), "--page", str(page)]).exit_code == 0
    missing = CliRunner().invoke(app, ["--results", str(tmp_path / "faults.json"), "--page", str(page)])
    assert (missing.exit_code, "faults.json" in missing.output.replace("\n", "")) == (1, True)
    content = json.loads(results.read_text(encoding="utf-8"))
    content["rows"][0]["statuses"] = {"OK": 777}
    other, stale = tmp_path / "faults.json", tmp_path / "page.md"
    other.write_text(json.dumps(content), encoding="utf-8")
    stale.write_bytes(page.read_bytes())
    places = ["--results", str(other), "--page", str(stale)]
    assert CliRunner().invoke(app, ["--check", *places]).exit_code == 1
    assert CliRunner().invoke(app, places).exit_code == 0
    assert CliRunner().invoke(app, ["--check", *places]).exit_code == 0
    assert "777 OK" in stale.read_text(encoding="utf-8")
