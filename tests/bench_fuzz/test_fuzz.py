"""A short run of `make fuzz`; and its negative controls: faults of a server that must be found."""

from pathlib import Path

from bench.fuzz.__main__ import fuzz
from bench.fuzz.findings import Findings
from bench.fuzz.subject import Subject
from bench.fuzz.watch import Bounds

IMPATIENT = Bounds(megabytes=100.0, rest=1.0, patience=3.0)
"""For servers of which it is known that something is wrong with them."""


def test_a_short_run_finds_nothing(subject: Subject, tmp_path: Path) -> None:
    findings, looks = Findings(tmp_path), list[int]()
    seen = fuzz(subject, findings, 4000, tell=lambda one: looks.append(one.total))
    assert findings.told == []
    assert seen.total >= 4000
    assert looks
    assert min(seen.messages.total(), seen.frames.total()) > 500
    assert set(seen.messages) >= {"sound", "changed", "any", "octets", "noise"}
    assert min(seen.rights["right"], seen.rights["wrong"]) > 500
    assert {code for _, code in seen.calls} >= {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"}
    assert seen.statuses["0"] > 10  # calls in frames that are answered, however they are cut up
    assert min(seen.looks.health, seen.looks.canary, seen.looks.lines) > 5


def test_faults_of_all_kinds_are_found(subject: Subject, tmp_path: Path) -> None:
    """All in one server: each has an oracle that finds it, and none of them ends the run."""
    findings = Findings(tmp_path)
    faults = ("tells", "refuses", "accepts", "hangs", "forgets", "differs", "floods", "hoards", "is ill")
    fuzz(subject, findings, 2000, bounds=IMPATIENT, faults=faults)
    assert {kind for kind, _ in findings.counts} >= {"call", "canary", "gauges", "health", "log", "memory"}
    told = "\n".join(findings.told)
    for sign in (
        "tells",  # a path in a message
        "/Score: INVALID_ARGUMENT",  # what is right is refused
        "OK (), not INVALID_ARGUMENT",  # what is wrong is not
        "/ListModels: never ended",
        "calls_in_flight not # although nobody asks",
        "is answered otherwise than before",
    ):
        assert sign in told, sign


def test_a_server_that_dies_is_found_and_can_be_made_to_again(subject: Subject, tmp_path: Path) -> None:
    first, again = Findings(tmp_path / "first"), Findings(tmp_path / "again")
    seen = fuzz(subject, first, 5000, faults=("gives up",))
    assert [kind for kind, _ in first.counts if kind == "died"] == ["died"]
    assert seen.total < 5000
    (path,) = (tmp_path / "first").glob("*-died.json")
    fuzz(subject, again, 0, faults=("gives up",), replay=path)
    assert "died" in {kind for kind, _ in again.counts}
