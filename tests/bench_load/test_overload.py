"""What is made of a run under overload; and, in short, a real one."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.load.options import ServingOptions
from bench.load.servers import Server, ServerName
from bench.overload import judged, overloaded, table
from tests.reversal import Reversal


def load(latencies: list[float], **errors: int) -> dict[str, Any]:
    return {"latencies": latencies, "errors": errors, "seconds": 10.0, "busy": 0.5}


def test_answers_in_time_are_what_counts() -> None:
    found = judged(100.0, load([0.5] * 950, RESOURCE_EXHAUSTED=4000, DEADLINE_EXCEEDED=50), 2.0, 100.0)
    assert (found["goodput"], found["share"], found["offered"]) == (95.0, 0.95, 500.0)
    assert (found["p99_of_answers"], found["failures"]) == (0.5, [])


FAILING: dict[str, tuple[dict[str, Any], str]] = {
    "too few": (load([0.5] * 899), "goodput is 90 % of the capacity, not 90"),
    "none": (load([], RESOURCE_EXHAUSTED=1), "goodput is 0 % of the capacity, not 90"),
    "too late": (load([0.5] * 980 + [2.5] * 20), "the 99th percentile of answers is 2.50 s"),
    "broken": (load([0.5] * 950, UNAVAILABLE=1, INTERNAL=2), "requests ended with INTERNAL, UNAVAILABLE"),
}


@pytest.mark.parametrize("what", FAILING)
def test_what_is_wrong_is_said(what: str) -> None:
    found, message = FAILING[what]
    assert message in judged(100.0, found, 2.0, 100.0)["failures"]
    assert not math.isnan(judged(100.0, found, 2.0, 100.0)["share"])


def test_a_server_that_does_not_recover_fails() -> None:
    found = judged(100.0, load([0.5] * 950), 2.0, 50.0)
    assert found["failures"] == ["afterwards it gives 50 % of the answers that it gave before"]


def test_fault_23_a_short_overload(reversal: Reversal) -> None:
    """How much is left of the capacity, seconds on a busy machine do not say; that nothing else breaks, they do."""
    options = ServingOptions(beam=16, queue=32, longest=12)
    server = Server(name=ServerName.LIMELIGHT, python=Path(sys.executable), model=reversal.bundle, options=options)
    found = overloaded(server, ["abcdefgh", "abc", "hgfedcba"], times=5.0, seconds=3.0, deadline=2.0, for_generator=1)
    assert set(found["errors"]) <= {"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
    assert found["errors"].get("RESOURCE_EXHAUSTED", 0) > 0
    assert found["goodput"] > 0
    assert found["capacity_after"] > 0.5 * found["capacity"]
    assert table(found).row_count >= 6
