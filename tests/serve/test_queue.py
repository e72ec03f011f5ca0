"""What the engine takes on, in which batches, and what becomes of jobs that are given up or come too late."""

import pytest

from serve.engine import Job
from serve.errors import QueueFullError, ShuttingDownError
from tests.serve.jobs import LONG, MIDDLE, SHORT, MakeEngine, alone, job, occupied, result, same
from tests.serve.running import PATIENCE
from tests.serve.steps import Gated

BATCHES: dict[str, tuple[dict[str, int], list[Job], list[int]]] = {
    "whatever waits": ({}, [job(SHORT), job(LONG), job(MIDDLE)], [3]),
    "no more rows": ({"rows": 2}, [job(SHORT)] * 5, [2, 2, 1]),
    "rows are sentences times beams": ({"rows": 8}, [job(SHORT, beam_size=3)] * 4, [2, 2]),
    "no more tokens": ({"batch_tokens": 12}, [job(MIDDLE)] * 4, [3, 1]),
    "tokens are padded ones": ({"batch_tokens": 12}, [job(SHORT), job(SHORT), job(MIDDLE), job(SHORT)], [3, 1]),
    "tokens count for each beam": ({"batch_tokens": 12}, [job(SHORT, beam_size=2)] * 4, [3, 1]),
    "tokens of either side": ({"batch_tokens": 12}, [job(SHORT, target=MIDDLE)] * 4, [3, 1]),
    "no more attention": ({"batch_attention": 36}, [job(MIDDLE), job(MIDDLE), job(MIDDLE)], [2, 1]),
    "one job is always taken": ({"rows": 1, "batch_tokens": 1}, [job(LONG, beam_size=4), job(SHORT)], [1, 1]),
    "one beam size": ({}, [job(SHORT), job(SHORT, beam_size=2), job(SHORT, beam_size=2), job(SHORT)], [1, 2, 1]),
    "searches or scores": ({}, [job(SHORT), job(SHORT, target=SHORT), job(MIDDLE, target=SHORT)], [1, 2]),
}
"""The limits, what waits, and the batches it makes, in order of arrival."""


@pytest.mark.parametrize("what", BATCHES)
def test_batches_are_what_waits_and_fits(make_engine: MakeEngine, steps: Gated, what: str) -> None:
    limits, jobs, expected = BATCHES[what]
    engine = make_engine(**limits)
    first = occupied(engine, steps)
    tickets = [engine.submit(one) for one in jobs]
    assert engine.waiting == len(jobs)
    steps.open()
    for ticket, one in zip(tickets, jobs, strict=True):
        assert result(ticket).hypotheses[0].tokens == (one.target or one.source)
    assert result(first).hypotheses[0].tokens == SHORT
    assert steps.batches == [1, *expected]
    assert engine.waiting == 0


def test_a_full_queue_refuses(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine(queue=2)
    occupied(engine, steps)
    waiting = [engine.submit(job(SHORT)), engine.submit(job(SHORT))]
    with pytest.raises(QueueFullError, match=r"^2 requests are waiting, the limit is 2: retry later$"):
        engine.submit(job(SHORT))
    steps.open()
    assert [result(ticket).hypotheses[0].tokens for ticket in waiting] == [SHORT, SHORT]


def test_a_cancelled_job_gives_its_place_in_the_queue_back(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine(queue=2)
    occupied(engine, steps)
    given_up, waiting = engine.submit(job(LONG)), engine.submit(job(SHORT))
    given_up.cancel()
    another = engine.submit(job(MIDDLE))
    steps.open()
    assert result(waiting).hypotheses[0].tokens == SHORT
    assert result(another).hypotheses[0].tokens == MIDDLE
    assert given_up.future.cancelled()
    assert steps.batches == [1, 2]


def test_a_cancelled_job_leaves_its_batch_at_the_next_step(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine()
    occupied(engine, steps)
    given_up, mate = engine.submit(job(LONG, beam_size=2)), engine.submit(job(MIDDLE, beam_size=2))
    steps.let(2)  # the first job's two steps
    steps.wait()
    steps.wait()
    given_up.cancel()
    steps.open()
    assert same(result(mate).hypotheses, alone(MIDDLE, 2))
    assert steps.rows[2] == 2  # the first step has a row a sentence: the begin token
    assert set(steps.rows[3:]) == {2}  # then one sentence's two beams


def test_a_batch_that_nobody_waits_for_ends(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine()
    ticket = engine.submit(job(LONG))
    steps.wait()
    ticket.cancel()
    another = engine.submit(job(SHORT))
    steps.open()
    assert result(another).hypotheses[0].tokens == SHORT
    assert steps.rows == [1, 1, 1]


def test_cancelling_what_is_done_is_harmless(make_engine: MakeEngine, steps: Gated) -> None:
    steps.open()
    ticket = make_engine().submit(job(SHORT))
    result(ticket)
    ticket.cancel()
    assert result(ticket).hypotheses[0].tokens == SHORT


def test_stopping_finishes_what_waits_and_refuses_what_comes(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine(rows=1)
    tickets = [occupied(engine, steps), engine.submit(job(MIDDLE)), engine.submit(job(LONG))]
    assert not engine.stop(0)
    with pytest.raises(ShuttingDownError, match=r"^the server is shutting down and takes no new requests$"):
        engine.submit(job(SHORT))
    steps.open()
    assert engine.stop(PATIENCE)
    assert not engine.alive
    assert [result(ticket).hypotheses[0].tokens for ticket in tickets] == [SHORT, MIDDLE, LONG]
