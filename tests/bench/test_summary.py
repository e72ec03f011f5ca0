"""The tables of docs/performance.md are those of the JSON files."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from bench.grid import BenchError
from bench.summary import Decoding, fill, load_table, main, profile_table

ROOT = Path(__file__).parents[2]


def cell(attention: str = "none", threads: int = 1, sentences: int = 1, beam: int = 1, **more: Any) -> dict[str, Any]:
    row = {"model": "random-d256-3-3", "precision": "float32", "sentences": sentences, "beam": beam}
    figures = {"ours": 1234.5, "peer": 1000.4, "ratio": 1.234, "ratio_low": 1.2, "ratio_high": 1.3, "price": None}
    limits = {"limit_share": 0.256, "peer_limit_share": 0.2}
    return row | {"attention": attention, "threads": threads} | figures | limits | more


ROWS = [
    cell(),
    cell("cross", ratio=1.1, price=0.02),
    cell("all", ratio=1.0, price=0.09),
    cell(threads=2, ratio=2.5),
    cell(sentences=32, ratio=0.75),
    cell("cross", sentences=32, price=-0.01),
    cell("cross", sentences=8, price=0.05),
    cell("cross", threads=2, price=0.9),
    cell(beam=4, ratio=0.8),
    cell(beam=4, sentences=8, ratio=0.9),
]


def test_a_cell_is_one_line_with_its_neighbours() -> None:
    head, below, *lines = Decoding(ROWS).table()
    assert head.count("|") == below.count("|") == lines[0].count("|")
    assert lines == [
        "| random, d 256 | float32 | 1 | 1 | 1,234 | 1,000 | 1.23 (1.20-1.30) | 1.10 | 1.00 | 2.50 | 26 %, 20 % |",
        "| random, d 256 | float32 | 32 | 1 | 1,234 | 1,000 | 0.75 (1.20-1.30) | 1.23 | - | - | 26 %, 20 % |",
        "| random, d 256 | float32 | 1 | 4 | 1,234 | 1,000 | 0.80 (1.20-1.30) | - | - | - | 26 %, 20 % |",
        "| random, d 256 | float32 | 8 | 4 | 1,234 | 1,000 | 0.90 (1.20-1.30) | - | - | - | 26 %, 20 % |",
    ]


def test_goals_stand_beside_what_was_reached_on_one_thread() -> None:
    head, below, *lines = Decoding(ROWS).goals()
    assert head == "| goal | random, d 256 |"
    assert below == "| --- | --- |"
    reached = dict(line.strip("| ").split(" | ") for line in lines)
    assert reached["2.0 times CTranslate2 at one sentence, float32"] == "1.23"
    assert reached["1.3 times at 32 sentences, float32"] == "0.75"
    assert reached["1.3 times at 32 sentences, int8"] == "-"
    assert reached["1.3 times under beam 4, float32"] == "0.80 to 0.90"
    assert reached["60 % of the limit at batch 32, float32"] == "26 % (CTranslate2 20 %)"
    assert reached["price of all cross-attention at most 3 %"] == "2.0 (-1.0 to 5.0)"
    assert reached["price of all three families at most 15 %"] == "9.0 (9.0 to 9.0)"


def test_servers_at_their_best_and_with_all_callers() -> None:
    figures = {"goodput": 1158.4, "p50_ms": 9.6, "p99_ms": 38.7, "processor_ms": 0.91, "memory_mb": 76.1}
    rows = [
        {"server": "triton", "mode": "closed", "rate": None, "callers": 64, **figures},
        {"server": "triton", "mode": "open", "rate": 10.0, "callers": None, **figures},
        {"server": "triton", "mode": "best", "rate": 1170.2, "callers": None, **figures},
        {"server": "limelight", "mode": "closed", "rate": None, "callers": 64, **figures},
    ]
    assert load_table(rows)[2:] == [
        "| tritonserver | best, 1,170/s | 1,158 | 10 | 39 | 0.9 | 76 |",
        "| Limelight | 64 callers | 1,158 | 10 | 39 | 0.9 | 76 |",
        "| tritonserver | 64 callers | 1,158 | 10 | 39 | 0.9 | 76 |",
    ]


def test_a_step_of_each_graph() -> None:
    rows = [
        {"sentences": 32, "beam": 4, "graph": graph, "step": step, "calls": {"MatMul": 3.0, "Add": count}}
        for graph, step, count in (("traced", 20_929.2, 4.0), ("fp32", 1000.0, 2.0), ("int8", 900.0, 5.99))
    ]
    assert profile_table(rows)[2:] == ["| 32 sentences, beam 4 | 20,929 µs, 7 | 1,000 µs, 5 | 900 µs, 9 |"]


def test_tables_go_between_their_marks_and_nothing_else_changes() -> None:
    page = "one\n<!-- a -->\nold\n<!-- end of a -->\ntwo \\1\n<!-- b --><!-- end of b -->\n"
    after = fill(page, {"a": ["| \\g<1> |", "| x |"]})
    assert after == "one\n<!-- a -->\n\n| \\g<1> |\n| x |\n\n<!-- end of a -->\ntwo \\1\n<!-- b --><!-- end of b -->\n"
    assert fill(after, {"a": ["| \\g<1> |", "| x |"]}) == after


@pytest.mark.parametrize(
    ("page", "count"),
    [
        ("", 0),
        ("<!-- end of a -->\n<!-- a -->\n", 0),
        ("<!-- a -->\n<!-- end of a -->\n" * 2, 2),
        ("<!-- a -->\n<!-- a -->\n<!-- end of a -->\n", 2),
    ],
)
def test_a_page_without_a_place_for_a_table_is_refused(page: str, count: int) -> None:
    with pytest.raises(BenchError, match=f"the page has {count} places for the table 'a'"):
        fill(page, {"a": []})


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    """The figures that are published are those of the files beside it."""
    app = Typer()
    app.command()(main)
    results, page = ROOT / "bench" / "results", ROOT / "docs" / "performance.md"
    places = ["--results", str(results), "--page", str(page)]
    assert CliRunner().invoke(app, ["--check", *places]).exit_code == 0
    missing = CliRunner().invoke(app, ["--results", str(tmp_path), "--page", str(page)])
    assert (missing.exit_code, "decode.json" in missing.output.replace("\n", "")) == (1, True)
    stale, other = tmp_path / "page.md", tmp_path / "results"
    stale.write_bytes(page.read_bytes())
    other.mkdir()
    for path in results.glob("*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "decode.json":
            for row in content["rows"]:
                row["ours"] += 1000
        (other / path.name).write_text(json.dumps(content), encoding="utf-8")
    places = ["--results", str(other), "--page", str(stale)]
    assert CliRunner().invoke(app, ["--check", *places]).exit_code == 1
    assert CliRunner().invoke(app, places).exit_code == 0
    assert CliRunner().invoke(app, ["--check", *places]).exit_code == 0
