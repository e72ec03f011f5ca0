"""What the engine takes on, in which batches, and what becomes of jobs that are given up."""

import pytest

from model.search import SearchOptions
from model.steps import NO_FAMILIES
from serve.errors import QueueFullError, ShuttingDownError
from serve.jobs import Job
from tests.serve.jobs import LONG, MIDDLE, SHORT, MakeEngine, alone, job, occupied, result, same, tokens
from tests.serve.running import PATIENCE
from tests.serve.steps import Gated

TOKENS = {len(source): len(source) + 16 for source in (SHORT, MIDDLE)}
"""What a row of each counts as, with its longest answer."""

PLAIN = job(MIDDLE, attention=NO_FAMILIES)
PLAIN_SCORE = job(MIDDLE, target=MIDDLE, attention=NO_FAMILIES)

BATCHES: dict[str, tuple[dict[str, int], list[Job], list[int]]] = {
    "whatever waits": ({}, [job(SHORT), job(LONG), job(MIDDLE)], [3]),
    "every beam size": ({}, [job(SHORT), job(SHORT, beam_size=2), job(SHORT, beam_size=2), job(SHORT)], [4]),
    "searches or scores": ({}, [job(SHORT), job(SHORT, target=SHORT), job(MIDDLE, target=SHORT)], [1, 2]),
    "in order of arrival": ({}, [job(SHORT, target=SHORT), job(SHORT), job(MIDDLE, target=SHORT)], [1, 1, 1]),
    # Of rows: one is the first job's, for two steps; two are those of the first two that join, for two steps more.
    "no more rows": ({"rows": 3}, [job(SHORT)] * 6, [2, 1, 2, 1]),
    "rows are sentences times beams": ({"rows": 7}, [job(SHORT, beam_size=3)] * 4, [2, 2]),
    "no more rows of scores": ({"rows": 2}, [job(SHORT, target=SHORT)] * 5, [2, 2, 1]),
    # Of tokens in one encoder pass:
    "no more to read": ({"encode_tokens": 12}, [job(MIDDLE)] * 4, [3, 1]),
    "tokens to read are padded": ({"encode_tokens": 12}, [job(SHORT), job(SHORT), job(MIDDLE), job(SHORT)], [3, 1]),
    "tokens are read once for all beams": ({"encode_tokens": 12}, [job(MIDDLE, beam_size=2)] * 4, [3, 1]),
    "a score reads either side": ({"encode_tokens": 12}, [job(SHORT, target=MIDDLE)] * 4, [3, 1]),
    # Of tokens kept: the first job's are given back after two steps, too few for another.
    "no more tokens": ({"tokens": TOKENS[2] + 2 * TOKENS[4]}, [job(MIDDLE)] * 4, [2, 2]),
    "tokens count for each beam": ({"tokens": 5 * TOKENS[2]}, [job(SHORT, beam_size=2)] * 4, [2, 2]),
    # Of attention: 4 weights are the first job's.
    "no more attention": ({"attention": 36}, [job(MIDDLE)] * 3, [2, 1]),
    "attention counts for each beam": ({"attention": 36}, [job(MIDDLE, beam_size=2)] * 2, [1, 1]),
    "attention of scores is padded": ({"attention": 36}, [job(SHORT, target=MIDDLE)] * 3, [2, 1]),
    "no attention counts for nothing": ({"attention": 4}, [PLAIN] * 3, [3]),
    "no attention of scores counts for nothing": ({"attention": 4}, [PLAIN_SCORE] * 3, [3]),
    "scores without are still limited in tokens": ({"encode_tokens": 8}, [PLAIN_SCORE] * 3, [2, 1]),
    # One that wants attention gets it computed for all that are scored with it.
    "attention of scores is that of all": (
        {"attention": 36},
        [PLAIN_SCORE, PLAIN_SCORE, job(MIDDLE, target=MIDDLE)],
        [2, 1],
    ),
    # What is over a limit by itself runs by itself.
    "one job is always taken": ({"rows": 1, "tokens": 1}, [job(LONG, beam_size=4), job(SHORT)], [1, 1]),
    "one job is always read": ({"encode_tokens": 1}, [job(LONG), job(SHORT)], [1, 1]),
    "one job's attention is always kept": ({"attention": 1}, [job(LONG), job(SHORT)], [1, 1]),
    "one score is always taken": (
        {"rows": 1, "encode_tokens": 1, "tokens": 1, "attention": 1},
        [job(LONG, target=LONG), job(SHORT, target=SHORT)],
        [1, 1],
    ),
    # Nobody is overtaken: three rows are too many beside the first job, one row behind it would not be.
    "a large one in its turn": ({"rows": 3}, [job(MIDDLE, beam_size=3), job(SHORT), job(SHORT)], [1, 2]),
    "a long one in its turn": ({"encode_tokens": 4}, [job(LONG), job(SHORT), job(SHORT)], [1, 2]),
}
"""The limits, what waits, and the batches it is read in, in order of arrival."""


@pytest.mark.parametrize("what", BATCHES)
def test_batches_are_what_waits_and_fits(make_engine: MakeEngine, steps: Gated, what: str) -> None:
    limits, jobs, expected = BATCHES[what]
    engine = make_engine(**limits)
    first = occupied(engine, steps)
    tickets = [engine.submit(one) for one in jobs]
    assert engine.waiting == len(jobs)
    steps.open()
    for ticket, one in zip(tickets, jobs, strict=True):
        assert tokens(ticket) == (one.target or one.source)
    assert tokens(first) == SHORT
    assert steps.batches == [1, *expected]
    assert engine.waiting == 0


OVER: dict[str, tuple[dict[str, int], Job]] = {
    "rows": ({"rows": 4}, job(MIDDLE, beam_size=8)),
    "tokens": ({"tokens": 3 * TOKENS[2]}, job(MIDDLE, options=SearchOptions(longest=60))),
    "tokens to read": ({"encode_tokens": 8}, job(LONG)),
    "attention": ({"attention": 20}, job(LONG)),
}
"""A limit, and a job that is over it by itself."""


@pytest.mark.parametrize("what", OVER)
def test_a_job_over_a_limit_is_decoded_alone_when_its_turn_comes(
    make_engine: MakeEngine, steps: Gated, what: str
) -> None:
    limits, large = OVER[what]
    engine = make_engine(**limits)
    occupied(engine, steps)
    before, ticket = engine.submit(job(SHORT)), engine.submit(large)
    steps.let(2)  # the first job's two steps; in the second, one more takes part
    steps.wait(2)
    small = [engine.submit(job(SHORT)) for _ in range(4)]  # each of which would fit beside what is under way
    assert engine.waiting == 5
    steps.open()
    beam = large.options.beam_size
    assert same(result(ticket).hypotheses, alone(large.source, beam)[:1])
    for one in (before, *small):
        assert tokens(one) == SHORT
    assert steps.batches[:3] == [1, 1, 1]
    assert steps.rows[:4] == [1, 2, 1, beam]
    alone_for = steps.passes[6:].index("encode")
    assert set(steps.rows[3 : 3 + alone_for]) == {beam}


def test_attention_grows_with_the_answer() -> None:
    one, beam = job(SHORT), job(MIDDLE, beam_size=3)
    assert [one.attention_size(age) for age in (0, 2, 3, 16)] == [4, 4, 9, 256]
    assert [beam.attention_size(age) for age in (0, 5)] == [48, 75]
    assert PLAIN.attention_size(16) == 0


def test_what_answers_under_way_have_grown_to_is_counted(make_engine: MakeEngine, steps: Gated) -> None:
    """Beside a source of two, the answer of ten tokens has 100 weights of a head, not four."""
    engine = make_engine(attention=40)
    options = SearchOptions(longest=16, shortest=12)
    long = engine.submit(job(SHORT, options=options))
    steps.wait()
    steps.let(7)
    steps.wait(7)
    late = engine.submit(job(SHORT))
    steps.open()
    assert tokens(late) == SHORT
    assert len(tokens(long)) == 12
    assert steps.batches == [1, 1]
    assert steps.rows == [1] * 14  # 64 weights and 4 are over the limit: one after the other


def test_fault_21_a_full_queue_refuses_exactly_what_is_too_much(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine(queue=8)
    occupied(engine, steps)
    clients = [str(number % 3) for number in range(8)]
    waiting = [engine.submit(job(SHORT, client=client)) for client in clients]
    for client in (*clients, "another"):
        with pytest.raises(QueueFullError, match=r"^8 requests are waiting, the limit is 8: retry later$") as caught:
            engine.submit(job(SHORT, client=client))
        assert caught.value.retry_after > 0
    steps.open()
    assert [tokens(ticket) for ticket in waiting] == [SHORT] * 8
    assert steps.batches == [1, 8]


def test_a_cancelled_job_gives_its_place_in_the_queue_back(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine(queue=2)
    occupied(engine, steps)
    given_up, waiting = engine.submit(job(LONG)), engine.submit(job(SHORT))
    given_up.cancel()
    another = engine.submit(job(MIDDLE))
    steps.open()
    assert tokens(waiting) == SHORT
    assert tokens(another) == MIDDLE
    assert given_up.future.cancelled()
    assert steps.batches == [1, 2]


def test_fault_27_a_cancelled_job_leaves_its_batch_at_the_next_step(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine()
    occupied(engine, steps)
    given_up, mate = engine.submit(job(LONG, beam_size=2)), engine.submit(job(MIDDLE, beam_size=2))
    steps.let(3)  # the first job's two steps, and one of theirs
    steps.wait(3)
    given_up.cancel()
    steps.open()
    assert same(result(mate).hypotheses, alone(MIDDLE, 2))
    assert steps.rows[:4] == [1, 1, 4, 4]
    assert set(steps.rows[4:]) == {2}


def test_a_batch_that_nobody_waits_for_ends(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine()
    ticket = engine.submit(job(LONG))
    steps.wait()
    ticket.cancel()
    another = engine.submit(job(SHORT))
    steps.open()
    assert tokens(another) == SHORT
    assert steps.rows == [1, 1, 1]


def test_cancelling_what_is_done_is_harmless(make_engine: MakeEngine, steps: Gated) -> None:
    steps.open()
    ticket = make_engine().submit(job(SHORT))
    result(ticket)
    ticket.cancel()
    assert tokens(ticket) == SHORT


def test_stopping_finishes_what_waits_and_refuses_what_comes(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine(rows=1)
    tickets = [occupied(engine, steps), engine.submit(job(MIDDLE)), engine.submit(job(LONG))]
    assert not engine.stop(0)
    with pytest.raises(ShuttingDownError, match=r"^the server is shutting down and takes no new requests$"):
        engine.submit(job(SHORT))
    steps.open()
    assert engine.stop(PATIENCE)
    assert not engine.alive
    assert [tokens(ticket) for ticket in tickets] == [SHORT, MIDDLE, LONG]
