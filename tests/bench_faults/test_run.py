"""Faults are put to a real server, and a server that is not up to one is found out."""

import dataclasses
import sys
from pathlib import Path

import pytest

from bench.faults.case import Fault, Finding, Verdict
from bench.faults.catalogue import ELSEWHERE, FAULTS
from bench.faults.kinds import Limelight
from bench.faults.run import TRIES, put, put_all
from bench.faults.wanted import Wanted
from tests.reversal import Reversal


@pytest.fixture(scope="module")
def limelight(reversal: Reversal) -> Limelight:
    return Limelight("limelight", "Limelight", Path(sys.executable), "reversal", reversal.bundle)


def fault(number: int) -> Fault:
    return next(one for one in FAULTS if one.number == number)


def wrong(finding: Finding) -> list[str]:
    return [one["seen"] for one in finding.checks if not one["passed"]]


@pytest.mark.parametrize("number", [11, 28, 32])
def test_a_fault_is_put_and_survived(limelight: Limelight, number: int) -> None:
    finding = put(fault(number), limelight)
    assert (finding.verdict, wrong(finding)) == (Verdict.EXPECTED, [])
    assert (finding.fault, finding.server, finding.alive) == (number, "limelight", True)


def test_a_full_queue_is_told_of_and_one_without_a_limit_found_out(limelight: Limelight) -> None:
    """How soon a call is refused, a busy machine does not say."""
    full = fault(21)
    finding = put(full, limelight)
    assert [one for one in wrong(finding) if not one.startswith("refused after")] == []
    assert finding.statuses == {"OK": 9, "RESOURCE_EXHAUSTED": 5}
    unlimited = put(dataclasses.replace(full, wanted=Wanted(queue=1024)), limelight)
    assert (unlimited.verdict, wrong(unlimited)) == (Verdict.OTHERWISE, ["0 refused, 5 too many"])
    assert unlimited.statuses == {"OK": 14}


def test_a_server_that_does_not_notice_that_its_model_hangs_is_found_out(
    limelight: Limelight, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.faults.failing.NOTICED", 1.0)
    finding = put(dataclasses.replace(fault(34), wanted=Wanted(watchdog=600.0)), limelight)
    assert finding.verdict == Verdict.NEVER
    assert "live and ready, and answers nobody" in wrong(finding)


def test_what_cannot_be_put_is_tried_again_and_told_of(limelight: Limelight, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho called >> {calls}\nexit 3\n", encoding="utf-8")
    python.chmod(0o700)
    told: list[Finding] = []
    found = put_all([fault(11)], [dataclasses.replace(limelight, python=python)], told.append)
    assert found == told
    assert (found[0].verdict, found[0].reason) == (
        Verdict.FAILED,
        "Limelight did not get ready; its log ends so:",
    )
    assert calls.read_text(encoding="utf-8").count("called") == TRIES


def test_what_makes_no_sense_for_a_server_is_not_put(limelight: Limelight) -> None:
    odd = dataclasses.replace(fault(11), lacking={"limelight": "it has none"})
    assert (put(odd, limelight).verdict, put(odd, limelight).reason) == (Verdict.INAPPLICABLE, "it has none")


def test_every_fault_is_put_or_has_a_reason_not_to_be() -> None:
    numbers = [*(one.number for one in FAULTS), *(number for some in ELSEWHERE.values() for number in some)]
    assert sorted(numbers) == list(range(1, 43))
