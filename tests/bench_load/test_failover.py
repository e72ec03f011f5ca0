"""What is made of replicas that were killed and stopped, and callers who count; the run itself is in tests/peers."""

from collections import Counter
from collections.abc import Iterator

import grpc
import pytest

from bench.failover import CUT_OFF, Event, Phase, judged, summary, table
from bench.load.callers import OK, WRONG, Asked, Callers, Ends, Kind, answered
from serve.answers import ServerError
from tests.serve.fake_server import FakeService, running
from tests.serve.faults import until

STREAMS = 2


def phase(event: Event, unary: dict[str, int] | None = None, stream: dict[str, int] | None = None) -> Phase:
    """In which calls ended so, beside those that were answered."""
    ends = Ends({Kind.UNARY: Counter({OK: 9} | (unary or {})), Kind.STREAM: Counter({OK: 9} | (stream or {}))})
    found = Phase(event, ends, retried=0 if event is Event.NONE else 3)
    if event is not Event.NONE:
        found.noticed, found.back, found.status = 1.0, 2.0, -9 if event is Event.KILLED else 0
    return found


WELL = [phase(Event.NONE), phase(Event.KILLED, stream={CUT_OFF: STREAMS}), phase(Event.STOPPED)]


def test_what_is_well_is_well() -> None:
    assert judged(WELL, STREAMS) == []


WRONG_PHASES: dict[str, tuple[Phase, str]] = {
    "a call lost": (phase(Event.KILLED, {"UNAVAILABLE": 1}), "killed: 1 unary calls ended with UNAVAILABLE"),
    "a stream that had not begun": (
        phase(Event.KILLED, stream={"UNAVAILABLE": 1}),
        "killed: 1 stream calls ended with UNAVAILABLE",
    ),
    "too many streams": (phase(Event.KILLED, stream={CUT_OFF: 3}), "killed: more streams were cut off than"),
    "another answer": (phase(Event.NONE, {WRONG: 1}), "steady: 1 unary calls ended with WRONG"),
    "a stream by stopping": (phase(Event.STOPPED, stream={CUT_OFF: 1}), "stopped: 1 stream calls ended with UNAVAIL"),
    "nobody answered": (phase(Event.NONE, {OK: 0}), "steady: no unary call was answered"),
}


@pytest.mark.parametrize("what", WRONG_PHASES)
def test_what_is_wrong_is_said(what: str) -> None:
    wrong, message = WRONG_PHASES[what]
    (failure,) = judged([*WELL, wrong], STREAMS)
    assert failure.startswith(message)


def test_how_a_replica_ends_and_whether_it_had_calls_is_judged_too() -> None:
    idle, stuck = phase(Event.KILLED), phase(Event.STOPPED)
    idle.retried, stuck.status = 0, 1
    failures = judged([phase(Event.NONE), idle, stuck], STREAMS)
    assert failures[0] == "stopped: the replica ended with status 1"
    assert failures[1].startswith("no call was tried again")


def test_phases_of_an_event_are_told_together() -> None:
    for one in (WELL[1], again := phase(Event.KILLED)):
        one.ends.latencies = [0.5, 1.5]
    steady, killed, stopped = summary([*WELL, again])
    assert (steady["times"], killed["times"], stopped["times"]) == (1, 2, 1)
    assert killed["ends"] == {Kind.UNARY: {OK: 18}, Kind.STREAM: {OK: 18, CUT_OFF: STREAMS}}
    assert (killed["retried"], killed["noticed"], killed["back"]) == (6, [1.0, 1.0], [2.0, 2.0])
    assert (killed["unary_p50"], killed["unary_longest"]) == (0.5, 1.5)
    assert table([killed]).row_count == len(Kind)


@pytest.fixture
def address() -> Iterator[str]:
    with running(FakeService()) as address:
        yield address


def test_callers_count_how_their_calls_end(address: str) -> None:
    right = answered(address, ["phone"]).answers
    assert right == {kind: {"phone": "F OW1 N"} for kind in Kind}
    asked = Asked(["phone"], {Kind.UNARY: {"phone": "something else"}, Kind.STREAM: right[Kind.STREAM]})
    with Callers(address, asked, {Kind.UNARY: 2, Kind.STREAM: 1}) as callers:
        until(lambda: all(callers.ends.counts.values()))
        before, callers.ends = callers.ends, Ends()
        until(lambda: all(callers.ends.counts.values()))
    assert {kind: set(counts) for kind, counts in before.counts.items()} == {Kind.UNARY: {WRONG}, Kind.STREAM: {OK}}
    assert len(callers.ends.latencies) == callers.ends.counts[Kind.UNARY][WRONG]


def test_callers_tell_of_errors_apart_whether_something_had_come(address: str) -> None:
    with Callers(address, Asked(["!UNAVAILABLE"], {}), dict.fromkeys(Kind, 1)) as callers:
        until(lambda: all(callers.ends.counts.values()))
    assert set(callers.ends.counts[Kind.UNARY]) == {"UNAVAILABLE"}
    assert set(callers.ends.counts[Kind.STREAM]) == {CUT_OFF}
    assert callers.ends.said["UNAVAILABLE"].endswith("source: says the server")


def test_a_caller_that_fails_is_not_overlooked(address: str) -> None:
    with Callers(address, Asked(["phone"], {}), {Kind.UNARY: 1}) as callers, pytest.raises(KeyError):
        callers.wait(60)


def test_what_is_right_is_not_guessed(address: str) -> None:
    with pytest.raises(ServerError) as caught:
        answered(address, ["!NOT_FOUND"])
    assert caught.value.code is grpc.StatusCode.NOT_FOUND
