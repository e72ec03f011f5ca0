"""Deadlines: what nobody waits for any more leaves the queue, or its batch at the next step."""

from collections.abc import Callable
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

import serve.jobs
from serve.errors import ExpiredError, outcome_of
from serve.jobs import Job, Ticket
from tests.serve.jobs import LONG, MIDDLE, SHORT, MakeEngine, alone, job, occupied, result, same, tokens
from tests.serve.running import PATIENCE, Running, generate, score, stream
from tests.serve.steps import Gated

IN_QUEUE, UNDER_WAY = (
    "the deadline passed before the request's turn came",
    "the deadline passed before the answer was ready",
)


ALLOWED = 10 * PATIENCE
"""Seconds that a client allows where its call is to be dropped by the engine's clock, long before gRPC's own."""


class Clock:
    """Tells the time that a test has set, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What tickets look at."""
    clock = Clock()
    monkeypatch.setattr(serve.jobs, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def assert_expired(ticket: Ticket, message: str) -> None:
    with pytest.raises(ExpiredError, match=f"^{message}$"):
        result(ticket)


@pytest.mark.parametrize(("now", "expired"), [(0.0, False), (9.9, False), (10.0, True), (11.0, True)])
def test_a_deadline_is_a_time_of_the_clock(clock: Clock, now: float, expired: bool) -> None:
    clock.now = now
    assert Ticket(job(SHORT, deadline=10.0)).expired == expired
    assert not Ticket(job(SHORT)).expired


@pytest.mark.parametrize("target", [None, SHORT], ids=["search", "score"])
def test_fault_25_a_job_that_expires_leaves_the_queue(
    make_engine: MakeEngine, steps: Gated, clock: Clock, target: list[int] | None
) -> None:
    engine = make_engine()
    first = occupied(engine, steps)
    late = engine.submit(job(LONG, target=target, deadline=10.0))
    others = [engine.submit(job(MIDDLE, deadline=deadline)) for deadline in (10.5, None)]
    clock.now = 10.0
    steps.open()
    assert_expired(late, IN_QUEUE)
    assert [tokens(ticket) for ticket in (first, *others)] == [SHORT, MIDDLE, MIDDLE]
    assert steps.batches == [1, 2]


def test_fault_24_a_job_that_was_late_from_the_start_is_refused(
    make_engine: MakeEngine, steps: Gated, clock: Clock
) -> None:
    clock.now = 10.0
    steps.open()
    engine = make_engine()
    with pytest.raises(ExpiredError, match=f"^{IN_QUEUE}$"):
        engine.submit(job(LONG, deadline=10.0))
    assert tokens(engine.submit(job(SHORT, deadline=10.5))) == SHORT
    assert steps.batches == [1]


def test_an_expired_job_gives_its_place_in_the_queue_back(make_engine: MakeEngine, steps: Gated, clock: Clock) -> None:
    engine = make_engine(queue=2)
    occupied(engine, steps)
    late, waiting = engine.submit(job(LONG, deadline=10.0)), engine.submit(job(SHORT))
    clock.now = 10.0
    another = engine.submit(job(MIDDLE))
    assert_expired(late, IN_QUEUE)
    steps.open()
    assert tokens(waiting) == SHORT
    assert tokens(another) == MIDDLE
    assert steps.batches == [1, 2]


@pytest.mark.parametrize("beam_size", [1, 3])
def test_fault_26_a_job_that_expires_leaves_its_batch_at_the_next_step(
    make_engine: MakeEngine, steps: Gated, clock: Clock, beam_size: int
) -> None:
    engine = make_engine()
    occupied(engine, steps)
    late = engine.submit(job(LONG, beam_size, deadline=10.0))
    mate = engine.submit(job(MIDDLE, beam_size, beam_size, deadline=20.0))
    steps.let(3 if beam_size == 3 else 2)  # the first job's two steps; in the second, or after it, the others' first
    steps.wait(3 if beam_size == 3 else 2)
    clock.now = 10.0
    steps.open()
    assert_expired(late, UNDER_WAY)
    assert same(result(mate).hypotheses, alone(MIDDLE, beam_size))
    taken = 4 if beam_size == 3 else 3
    assert steps.rows[taken - 1] == 2 * beam_size  # the step in which it expired
    assert set(steps.rows[taken:]) == {beam_size}


def test_an_expired_job_makes_room_for_the_next(make_engine: MakeEngine, steps: Gated, clock: Clock) -> None:
    engine = make_engine(rows=1)
    late = engine.submit(job(LONG, deadline=10.0))
    steps.wait()
    waiting = engine.submit(job(SHORT, deadline=20.0))
    clock.now = 10.0
    steps.open()
    assert_expired(late, UNDER_WAY)
    assert tokens(waiting) == SHORT
    assert steps.rows == [1, 1, 1]


def test_an_answer_that_became_ready_in_its_last_step_is_given(
    make_engine: MakeEngine, steps: Gated, clock: Clock
) -> None:
    engine = make_engine()
    ticket = engine.submit(job(SHORT, deadline=10.0))
    steps.let()
    steps.wait(2)
    clock.now = 10.0
    steps.open()
    assert tokens(ticket) == SHORT


def test_who_gave_up_first_has_not_failed(make_engine: MakeEngine, steps: Gated, clock: Clock) -> None:
    engine = make_engine()
    under_way = engine.submit(job(LONG, deadline=10.0))
    steps.wait()
    queued = engine.submit(job(LONG, deadline=10.0))
    for ticket in (under_way, queued):
        ticket.cancel()
    clock.now = 10.0
    steps.open()
    assert tokens(engine.submit(job(SHORT))) == SHORT
    assert under_way.future.cancelled()
    assert queued.future.cancelled()


def test_it_has_a_status_of_its_own() -> None:
    assert outcome_of(ExpiredError(IN_QUEUE)) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXPIRED")


@pytest.fixture
def submitted(gated: Running, monkeypatch: pytest.MonkeyPatch) -> "SimpleQueue[Job]":
    """What the server queues, as soon as it is queued."""
    jobs: SimpleQueue[Job] = SimpleQueue()
    engine = gated.engine
    submit = engine.submit

    def told(job: Job) -> Ticket:
        ticket = submit(job)
        jobs.put(job)
        return ticket

    monkeypatch.setattr(engine, "submit", told)
    return jobs


CALLS: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {
    "Generate": (generate, lambda call: call.result()),
    "GenerateStream": (stream, list),
    "Score": (score, lambda call: call.result()),
}
"""How each call is begun, and awaited."""


@pytest.mark.parametrize("kind", CALLS)
def test_a_call_whose_time_is_over_is_not_computed(
    gated: Running, gate: Gated, clock: Clock, submitted: "SimpleQueue[Job]", kind: str
) -> None:
    begin, end = CALLS[kind]
    first = generate(gated.stub, timeout=None)
    gate.wait()
    late = begin(gated.stub, "abcd", timeout=ALLOWED)
    patient, hurried = submitted.get(timeout=PATIENCE), submitted.get(timeout=PATIENCE)
    assert patient.deadline is None
    assert hurried.deadline is not None
    assert 0 < hurried.deadline <= ALLOWED + 1  # gRPC rounds it up on its way
    clock.now = 2 * ALLOWED
    gate.open()
    with pytest.raises(grpc.RpcError):
        end(late)
    assert (late.code(), late.details()) == (grpc.StatusCode.DEADLINE_EXCEEDED, IN_QUEUE)
    assert first.result().hypotheses[0].text == "hgfedcba"
    assert gate.batches == [1]


@pytest.mark.parametrize("kind", ["Generate", "GenerateStream"])
def test_a_call_whose_time_is_over_leaves_its_batch(gated: Running, gate: Gated, clock: Clock, kind: str) -> None:
    begin, end = CALLS[kind]
    late = begin(gated.stub, timeout=ALLOWED)
    gate.wait()
    clock.now = 2 * ALLOWED
    gate.open()
    with pytest.raises(grpc.RpcError):
        end(late)
    assert (late.code(), late.details()) == (grpc.StatusCode.DEADLINE_EXCEEDED, UNDER_WAY)
    assert gate.rows == [1]
