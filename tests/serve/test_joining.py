"""Continuous batching: requests join and leave between steps, and are answered as if they were alone."""

import pytest

from model.steps import ALL_FAMILIES, NO_FAMILIES
from serve.jobs import Ticket
from tests.serve.jobs import LONG, MIDDLE, SHORT, MakeEngine, alone, encoded_alone, job, occupied, result, same, tokens
from tests.serve.steps import Gated


def assert_as_alone(ticket: Ticket, beam_size: int) -> None:
    """Tokens, scores and attention, of every hypothesis and of the encoder, bit for bit."""
    decoded, expected = result(ticket), alone(ticket.job.source, beam_size)
    assert len(decoded.hypotheses) == len(expected) == beam_size
    assert same(decoded.hypotheses, expected)
    assert encoded_alone(decoded, len(ticket.job.source))


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("late_by", [1, 4, 8])
@pytest.mark.parametrize("source", [SHORT, LONG, [9, 9, *LONG]], ids=["shorter", "as long", "longer"])
def test_a_request_joins_those_under_way_at_the_next_step(
    make_engine: MakeEngine, steps: Gated, beam_size: int, late_by: int, source: list[int]
) -> None:
    engine = make_engine()
    first = engine.submit(job(LONG, beam_size, beam_size))
    steps.wait()
    for _ in range(late_by - 1):
        steps.let()
        steps.wait()
    late = engine.submit(job(source, beam_size, beam_size))
    steps.open()
    assert_as_alone(late, beam_size)
    assert_as_alone(first, beam_size)
    assert steps.rows[: late_by + 1] == [*[beam_size] * late_by, 2 * beam_size]
    assert steps.batches == [1, 1]


def test_one_after_another_they_join_and_leave(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine()
    tickets = [engine.submit(job(LONG))]
    for source in (SHORT, LONG, SHORT, MIDDLE, SHORT):
        steps.wait()
        tickets.append(engine.submit(job(source)))
        steps.let()
    steps.open()
    for ticket in tickets:
        assert_as_alone(ticket, 1)
    # One longer at every arrival; the short ones leave after two steps, the middle one after four, the long after ten.
    assert steps.rows == [1, 2, 3, 3, 4, 4, 4, 3, 2, 2, 1, 1]
    assert steps.batches == [1] * 6


def test_whoever_gave_up_makes_room_at_the_next_step(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine(rows=2)
    given_up, mate = occupied(engine, steps, LONG), engine.submit(job(LONG))
    steps.let()
    steps.wait()
    late = engine.submit(job(MIDDLE))
    given_up.cancel()
    steps.let()  # the step in which it was given up
    steps.wait()
    assert steps.rows == [1, 2, 1]
    steps.let()
    steps.wait()
    steps.open()
    assert_as_alone(mate, 1)
    assert_as_alone(late, 1)
    assert steps.batches == [1, 1, 1]


def test_beam_sizes_are_decoded_side_by_side(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine()
    beams = [1, 3, 2, 3]
    first = occupied(engine, steps, LONG)
    tickets = [engine.submit(job(LONG, beam, beam)) for beam in beams]
    steps.let(4)
    steps.wait(4)
    assert steps.rows[:5] == [1, 2, 6, 2, 2]  # a step for each beam size, and all over again
    late = engine.submit(job(MIDDLE, 2, 2))
    steps.open()
    for ticket, beam in zip(tickets, beams, strict=True):
        assert_as_alone(ticket, beam)
    assert_as_alone(first, 1)
    assert_as_alone(late, 2)
    assert steps.batches == [1, 4, 1]


def test_a_short_answer_of_another_beam_size_does_not_wait(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine()
    long = engine.submit(job(LONG, beam_size=4))
    steps.wait()
    short = engine.submit(job(SHORT))
    steps.let(5)  # one step of the beam alone, and two of both
    assert tokens(short) == SHORT
    assert not long.future.done()
    steps.open()
    assert tokens(long) == LONG


def test_scores_are_computed_between_the_steps_of_others(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine()
    long = occupied(engine, steps, LONG)
    scored = engine.submit(job(MIDDLE, target=SHORT))
    steps.let(2)  # a step of the search, and the score
    assert tokens(scored) == SHORT
    assert not long.future.done()
    steps.open()
    assert_as_alone(long, 1)


def test_rows_under_way_step_between_two_encoder_passes(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine(encode_tokens=8)
    long = occupied(engine, steps, LONG)
    tickets = [engine.submit(job(MIDDLE)) for _ in range(7)]
    tickets += [engine.submit(job(MIDDLE, target=MIDDLE)) for _ in range(3)]
    steps.open()
    for ticket in tickets:
        assert tokens(ticket) == MIDDLE
    assert_as_alone(long, 1)
    assert steps.batches == [1, 2, 2, 2, 1, 2, 1]
    # An encoder pass, for scores one of the decoder too, and then a step for all that are under way.
    search, scores = ["encode", "step"], ["encode", "step", "step"]
    assert steps.passes[: 5 * 2 + 2 * 3] == [*search * 5, *scores * 2]
    assert set(steps.passes[16:]) == {"step"}


def test_attention_is_complete_from_the_first_token_whoever_joins(make_engine: MakeEngine, steps: Gated) -> None:
    """A request that wants none is under way when one comes that wants all."""
    engine = make_engine()
    first = engine.submit(job(LONG, attention=NO_FAMILIES))
    steps.let(2)
    steps.wait(3)
    late = engine.submit(job(LONG, attention=ALL_FAMILIES))
    steps.open()
    assert_as_alone(late, 1)
    assert result(first).hypotheses[0].cross_attention is None
    assert tokens(first) == LONG
