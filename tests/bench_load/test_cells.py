"""What measurements amount to: figures that a reader can check by hand."""

import json
import math
from typing import Any

import pytest

from bench.load.accounts import Memory
from bench.load.cells import Cell, percentile, summarise
from bench.load.report import loads_table, summary_table

LATE = 0.02


def cell(**changes: Any) -> Cell:
    values: dict[str, Any] = {
        "server": "limelight",
        "mode": "open",
        "load": 10.0,
        "objective": 0.1,
        "seconds": 2.0,
        "latencies": [0.01, 0.02, 0.2, 0.05],
        "errors": {},
        "answers": {"a": "A"},
        "lateness": [0.0] * 99 + [LATE],
        "busy": 0.5,
        "processor_seconds": 0.4,
        "memory": Memory(10.0, 15.0, 20.0),
    }
    return Cell(**{**values, **changes})


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50.0), (0.99, 99.0), (0.995, 100.0), (1.0, 100.0), (0.001, 1.0)])
def test_percentiles_are_values_that_were_measured(share: float, expected: float) -> None:
    assert percentile([float(value) for value in range(100, 0, -1)], share) == expected


def test_goodput_counts_answers_within_the_objective() -> None:
    assert cell().goodput == 1.5
    assert cell().throughput == 2.0


def test_an_unanswered_request_is_infinitely_late() -> None:
    failed = cell(latencies=[0.01] * 98, errors={"UNAVAILABLE": 1, "DEADLINE_EXCEEDED": 1})
    assert failed.latency(0.98) == 0.01
    assert failed.latency(0.99) == math.inf


def test_a_late_or_busy_generator_makes_a_cell_invalid() -> None:
    assert cell().valid
    assert not cell(lateness=[LATE] * 2).valid
    assert not cell(busy=0.95).valid


def test_rows_hold_medians_of_the_valid_rounds() -> None:
    rounds = [cell(latencies=[0.01] * count) for count in (2, 4, 8)]
    row = summarise([*rounds, cell(busy=1.0, latencies=[0.01] * 100)], {"model": "m"})[0]
    assert (row["model"], row["rounds"], row["invalid_rounds"], row["valid"]) == ("m", 3, 1, True)
    assert (row["goodput_lowest"], row["goodput"], row["goodput_highest"]) == (1.0, 2.0, 4.0)
    assert row["processor_ms"] == pytest.approx(100.0)
    assert (row["rate"], row["callers"]) == (10.0, None)


def test_rows_count_errors_by_kind_and_are_json() -> None:
    rows = summarise([cell(errors={"UNAVAILABLE": 2}), cell(latencies=[], errors={"UNAVAILABLE": 1})], {})
    assert rows[0]["errors"] == rows[0]["errors_unavailable"] == 3
    assert rows[0]["p99_ms"] is None
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert all(not isinstance(value, dict | list) for row in rows for value in row.values())


def test_answers_are_compared_with_limelights() -> None:
    other = cell(server="triton", answers={"a": "A", "b": "B", "c": "C"})
    rows = summarise([other, cell(answers={"a": "A", "b": "X"})], {})
    triton = next(row for row in rows if row["server"] == "triton")
    assert (triton["compared"], triton["agree"]) == (2, 0.5)


def test_ratios_are_limelights_over_the_other_servers() -> None:
    ours = [cell(load=rate, latencies=[0.01] * count) for rate, count in ((10, 20), (20, 40), (40, 10))]
    closed = [
        cell(mode="closed", load=64, latencies=[0.05] * 60),
        cell(mode="closed", load=64, latencies=[0.1] * 20, server="triton"),
    ]
    theirs = [cell(load=10, latencies=[0.01] * 10, server="triton")]
    rows = summarise([*ours, *closed, *theirs], {})
    best = {row["server"]: row for row in rows if row["mode"] == "best"}
    assert (best["limelight"]["rate"], best["triton"]["goodput_ratio"]) == (20, 4.0)
    together = next(row for row in rows if row["mode"] == "closed" and row["server"] == "triton")
    assert (together["goodput_ratio"], together["p99_ratio"]) == (3.0, 0.5)
    assert together["callers"] == 64


def test_what_few_rounds_reached_is_not_the_best() -> None:
    cells = [cell(load=10, latencies=[0.01] * 10) for _ in range(3)] + [cell(load=20, latencies=[0.01] * 99)]
    assert next(row for row in summarise(cells, {}) if row["mode"] == "best")["rate"] == 10


def test_an_invalid_run_gives_no_ratio() -> None:
    rows = summarise([cell(), cell(server="triton", busy=1.0)], {})
    assert next(row for row in rows if row["server"] == "triton" and row["mode"] == "best")["goodput_ratio"] is None


def test_tables_show_every_row() -> None:
    rows = summarise([cell(), cell(mode="closed", load=64), cell(server="triton", errors={"UNAVAILABLE": 9})], {})
    assert loads_table(rows, "loads").row_count == 3
    assert summary_table(rows, "summary").row_count == 3
