"""What is made of a server that a crowd came to; and, in short, real crowds."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.crowd import Crowd, Crowded, crowded, judged, table
from bench.load.crowds import Kind
from bench.load.options import ServingOptions
from bench.load.servers import ServerName
from bench.soak import GAUGES, free_port
from tests.reversal import Reversal


def found() -> dict[str, Any]:
    """As it is where all is well."""

    def state() -> dict[str, Any]:
        return {"files": 20, "megabytes": 100.0, "gauges": dict.fromkeys(GAUGES, 0.0)}

    parts = ("before", "during", "again", "after")
    return {
        **{when: {"answered": 100, "errors": {}, "newcomers_answered": 1.0} for when in parts},
        "states": {when: state() for when in parts},
        "idle": 0.01,
    }


def test_what_is_well_is_well() -> None:
    well = found()
    well["during"]["newcomers_answered"] = 0.96
    well["again"]["newcomers_answered"] = 0.5
    assert judged(well, 0) == []


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "errors": (lambda one: one["again"]["errors"].update(CANCELLED=3), "again: good clients got CANCELLED (3)"),
    "newcomers": (
        lambda one: one["during"].update(newcomers_answered=0.9),
        "during: 90 % of the newcomers were answered",
    ),
    "files": (lambda one: one["states"]["after"].update(files=99), "after: 99 open files, before 20"),
    "gauges": (lambda one: one["states"]["again"]["gauges"].update({GAUGES[0]: 1.0}), f"again: {GAUGES[0]} is 1.0"),
    "memory": (
        lambda one: one["states"]["again"].update(megabytes=300.0),
        "200 MB of memory are left of two crowds, 128 are allowed",
    ),
    "busy": (lambda one: one.update(idle=0.5), "it takes 50 % of a processor while nobody asks"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said(what: str) -> None:
    change, message = WRONG[what]
    wrong = found()
    change(wrong)
    assert judged(wrong, 0) == [message]


def test_how_it_ended_is_judged() -> None:
    assert judged(found(), 1) == ["it ended with status 1"]


@pytest.mark.parametrize(("kind", "count"), [(Kind.IDLE, 600), (Kind.RESETS, 2)])
def test_fault_30_good_clients_are_served_beside_a_small_crowd(reversal: Reversal, kind: Kind, count: int) -> None:
    server = Crowded(
        name=ServerName.LIMELIGHT,
        python=Path(sys.executable),
        model=reversal.bundle,
        options=ServingOptions(longest=12),
        metrics_port=free_port(),
        more=("--connections=300",),
    )
    crowd = Crowd(title="small", kind=kind, count=count)
    row = crowded(server, ["abcdefgh", "abc", "hgfedcba"], crowd, rate=30.0, seconds=1.5)
    # How idle it is, and how many of a handful of newcomers are answered, a moment on a busy machine does not say.
    assert [one for one in row["failures"] if "newcomers" not in one and "processor" not in one] == []
    assert row["during"]["answered"] > 20
    assert row["during"]["newcomers_answered"] > 0
    assert row["crowd"]["opened"] >= count
    assert row["crowd"].get("resets", 0) > 1000 or kind is not Kind.RESETS
    assert row["crowd"].get("hung up", 0) >= 350 or kind is Kind.RESETS
    assert table([row]).row_count == 3
