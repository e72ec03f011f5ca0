"""What the engine answers: each job's own result, whatever happens to the others of its batch."""

import logging
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from model.search import Node, SearchOptions, score
from model.steps import Memory
from model.tokenizer import END
from serve.engine import Decoded, Engine, Job
from serve.errors import EngineError
from tests.serve.jobs import LONG, MIDDLE, SHORT, MakeEngine, alone, job, occupied, result, same
from tests.serve.running import PATIENCE
from tests.serve.steps import Echo, Gated


def test_a_job_is_decoded(make_engine: MakeEngine, steps: Gated) -> None:
    steps.open()
    decoded = result(make_engine().submit(job(MIDDLE)))
    assert [hypothesis.tokens for hypothesis in decoded.hypotheses] == [MIDDLE]
    np.testing.assert_array_equal(decoded.hypotheses[0].cross_attention, np.eye(4)[None, None])
    np.testing.assert_array_equal(decoded.encoder_attention, np.full((1, 1, 4, 4), 0.25))


@pytest.mark.parametrize("beam_size", [1, 3])
def test_batch_mates_leave_a_result_as_it_is(make_engine: MakeEngine, steps: Gated, beam_size: int) -> None:
    engine = make_engine()
    occupied(engine, steps)
    sources = [SHORT, LONG, MIDDLE, SHORT]
    tickets = [engine.submit(job(source, beam_size=beam_size, hypotheses=beam_size)) for source in sources]
    steps.open()
    for ticket, source in zip(tickets, sources, strict=True):
        decoded, expected = result(ticket), alone(source, beam_size)
        assert len(decoded.hypotheses) == len(expected) == beam_size
        assert same(decoded.hypotheses, expected)
        assert decoded.encoder_attention.shape == (1, 1, len(source), len(source))
        np.testing.assert_allclose(decoded.encoder_attention, 1 / len(source))
    assert steps.batches == [1, 4]


def test_a_short_answer_does_not_wait_for_a_long_one(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine()
    occupied(engine, steps)
    short, long = engine.submit(job(SHORT)), engine.submit(job(LONG))
    steps.let(4)  # two steps of the first job, two of the batch
    assert result(short).hypotheses[0].tokens == SHORT
    assert not long.future.done()
    steps.open()
    assert result(long).hypotheses[0].tokens == LONG


class Failing(Echo):
    """Cannot read one of the tokens."""

    def encode(self, source_ids: np.ndarray, source_mask: np.ndarray) -> Memory:
        if np.any(source_ids == 11):
            raise RuntimeError("secret of the runtime")
        return super().encode(source_ids, source_mask)


@pytest.mark.parametrize("target", [None, SHORT], ids=["search", "score"])
def test_a_failing_model_fails_its_batch_alone(caplog: pytest.LogCaptureFixture, target: list[int] | None) -> None:
    steps = Gated(Failing())
    engine = Engine(steps)
    first = occupied(engine, steps)
    bad = [engine.submit(job(source, target=target)) for source in (MIDDLE, [11, END])]
    good = engine.submit(job(MIDDLE, beam_size=2))
    with caplog.at_level(logging.CRITICAL):
        steps.open()
        for ticket in bad:
            with pytest.raises(EngineError, match=r"^the engine failed on this batch$"):
                result(ticket)
    assert result(first).hypotheses[0].tokens == SHORT
    assert result(good).hypotheses[0].tokens == MIDDLE
    assert engine.alive
    assert engine.stop(PATIENCE)


def test_what_failed_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(Failing())
    with pytest.raises(EngineError, match="failed"):
        result(engine.submit(job([11, END])))
    assert engine.stop(PATIENCE)
    assert "a batch of 1 failed" in caplog.text
    assert "secret of the runtime" in caplog.text


def test_scores_are_those_of_forced_decoding(make_engine: MakeEngine, steps: Gated) -> None:
    engine = make_engine()
    occupied(engine, steps)
    pairs = [(SHORT, MIDDLE), (LONG, SHORT), (MIDDLE, MIDDLE)]
    penalties = [0.0, 1.0, 2.0]
    tickets = [
        engine.submit(Job(source=source, target=target, options=SearchOptions(longest=16, length_penalty=penalty)))
        for (source, target), penalty in zip(pairs, penalties, strict=True)
    ]
    steps.open()
    for ticket, (source, target), penalty in zip(tickets, pairs, penalties, strict=True):
        decoded, (expected,) = result(ticket), score(Echo(), [source], [target], [penalty])
        assert same(decoded.hypotheses, [expected])
        assert decoded.hypotheses[0].tokens == target
        assert decoded.hypotheses[0].log_probabilities == pytest.approx(expected.log_probabilities, abs=1e-6)
        assert decoded.encoder_attention.shape == (1, 1, len(source), len(source))
    assert steps.batches == [1, 3]


class Listener:
    """Keeps what it is told, and what thread it is told by.

    Attributes:
        settled: the tokens that were certain after each step.
    """

    def __init__(self, fails_after: int | None = None) -> None:
        self.settled: list[list[int]] = []
        self.begun: list[Decoded] = []
        self.threads: set[str] = set()
        self._fails_after = fails_after

    def __call__(self, begun: Decoded, nodes: Sequence[Node]) -> None:
        if len(self.settled) == self._fails_after:
            raise RuntimeError("the listener is gone")
        self.settled.append([node.token for node in nodes])
        self.begun.append(begun)
        self.threads.add(threading.current_thread().name)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_listener_is_told_of_each_token_once_it_is_certain(
    make_engine: MakeEngine, steps: Gated, beam_size: int
) -> None:
    listener, engine = Listener(), make_engine()
    occupied(engine, steps)
    mate, ticket = engine.submit(job(LONG, beam_size)), engine.submit(job(MIDDLE, beam_size, on_settled=listener))
    steps.open()
    best = result(ticket).hypotheses[0].tokens
    assert listener.settled[-1] == best == MIDDLE
    for earlier, later in zip(listener.settled, listener.settled[1:], strict=False):
        assert later[: len(earlier)] == earlier
    if beam_size == 1:
        assert listener.settled == [MIDDLE[:count] for count in range(1, len(MIDDLE) + 1)]
    assert {begun.encoder_attention.shape for begun in listener.begun} == {(1, 1, 4, 4)}
    assert not any(begun.hypotheses for begun in listener.begun)
    assert listener.threads == {"limelight-engine"}
    assert result(mate).hypotheses[0].tokens == LONG


@pytest.mark.parametrize("fails_after", [0, 2, len(MIDDLE) - 1], ids=["first", "middle", "last"])
def test_a_listener_that_fails_harms_no_one_else(make_engine: MakeEngine, steps: Gated, fails_after: int) -> None:
    listener, engine = Listener(fails_after), make_engine()
    occupied(engine, steps)
    bad = engine.submit(job(MIDDLE, on_settled=listener))
    mates = [engine.submit(job(source)) for source in (SHORT, MIDDLE, LONG)]
    steps.open()
    with pytest.raises(EngineError, match=r"^the stream could not be written$"):
        result(bad)
    assert [result(mate).hypotheses[0].tokens for mate in mates] == [SHORT, MIDDLE, LONG]
    assert len(listener.settled) == fails_after
    assert steps.batches == [1, 4]
