"""What fails, fails alone: sources that cannot be read, a step, or options that leave nothing to say."""

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np
import pytest

from model.errors import InvalidRequestError
from model.hypotheses import Hypothesis
from model.search import SearchOptions
from model.sentence import Sentence
from model.steps import Array, Memory, Question, Step
from model.store import ArrayStore, Store
from model.vocabulary import END
from serve.engine import Engine
from serve.errors import EngineError, EngineFailedError, ExpiredError, OutOfMemoryError, outcome_of
from serve.jobs import Decoded, EngineLimits, Ticket, deadline_in
from tests.serve.jobs import EVERY_WORD, LONG, MIDDLE, SHORT, MakeEngine, alone, job, occupied, result, same, tokens
from tests.serve.running import PATIENCE
from tests.serve.steps import Echo, Gated

UNREADABLE = 11
BAD, STEADY = [UNREADABLE, 4, 4, 4, END], [5, 6, 7, 8, 9, 4, 5, END]
OTHER = [9, 8, 7, 6, 5, 4, END]

Start = Callable[[Echo], tuple[Engine, Gated]]


class FailingEncoder(Echo):
    """Cannot encode one of the tokens."""

    def encode(self, source_ids: Array, source_mask: Array, attention: bool = True) -> Memory:
        if (source_ids == UNREADABLE).any():
            raise RuntimeError("secret of the runtime")
        return super().encode(source_ids, source_mask, attention)


class FailingDecoder(Echo):
    """Cannot decode from one of the tokens, once so many were generated."""

    def __init__(self, after: int = 0) -> None:
        self._after = after

    def step(self, question: Question) -> Step:
        bad = (question.memory.tensors[0] == UNREADABLE).any(1)
        if (question.positions[bad] >= self._after).any():
            raise RuntimeError("secret of the runtime")
        return super().step(question)


class Clinging(ArrayStore):
    """Fails when a sentence is to leave it."""

    def leave(self, order: Sequence[int]) -> None:
        raise RuntimeError(f"secret of the runtime, which keeps {len(order)}")


class GatedClinging(Gated):
    """Keeps its sentences in such a store."""

    def new_store(self, width: int) -> Store:
        return Clinging(self, width)


@pytest.fixture
def start() -> Iterator[Start]:
    """Engines on gated steps, which must be alive in the end."""
    started: list[tuple[Engine, Gated]] = []

    def begin(model: Echo) -> tuple[Engine, Gated]:
        steps = Gated(model)
        started.append((Engine(steps, EngineLimits()), steps))
        return started[-1]

    yield begin
    for engine, steps in started:
        steps.open()
        assert engine.alive
        assert engine.stop(PATIENCE)


def assert_failed(*tickets: Ticket) -> None:
    for ticket in tickets:
        with pytest.raises(EngineError, match=r"^the engine failed on this request$"):
            result(ticket)


@pytest.mark.parametrize("target", [None, SHORT], ids=["search", "score"])
@pytest.mark.parametrize("model", [FailingEncoder(), FailingDecoder()], ids=["encoder", "decoder"])
def test_fault_32_of_a_batch_that_fails_only_those_fail_that_fail_alone(
    start: Start, caplog: pytest.LogCaptureFixture, model: Echo, target: list[int] | None
) -> None:
    engine, steps = start(model)
    first = occupied(engine, steps, STEADY)
    mates = [engine.submit(job(source, 2, 2, target=target)) for source in (MIDDLE, LONG[:6])]
    bad = [engine.submit(job(BAD, beam_size=2, target=target)) for _ in range(2)]
    mates.append(engine.submit(job(MIDDLE, 2, 2, target=target)))
    with caplog.at_level(logging.CRITICAL):
        steps.open()
        assert_failed(*bad)
        for ticket, source in zip(mates, (MIDDLE, LONG[:6], MIDDLE), strict=True):
            if target is None:
                assert same(result(ticket).hypotheses, alone(source, 2))
            else:
                assert tokens(ticket) == target
    assert same(result(first).hypotheses, alone(STEADY, 1))
    assert max(steps.batches) == 5
    assert steps.batches.count(1) >= 1 + len(mates)


def test_fault_32_a_step_that_fails_midway_fails_the_poisonous_row_alone(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    engine, steps = start(FailingDecoder(after=2))
    first = occupied(engine, steps, STEADY)
    told: list[int] = []
    bad, mate, finished = (engine.submit(job(source, beam_size=1)) for source in (BAD, MIDDLE, SHORT))
    streamed = engine.submit(job(OTHER, on_settled=lambda _, nodes: told.append(len(nodes))))
    aside = engine.submit(job(MIDDLE, 3, 3))
    with caplog.at_level(logging.CRITICAL):
        steps.open()
        assert_failed(bad)
    for ticket, source in ((first, STEADY), (mate, MIDDLE), (finished, SHORT), (streamed, OTHER)):
        assert same(result(ticket).hypotheses, alone(source, 1))
    assert told[-1] == len(OTHER)
    assert same(result(aside).hypotheses, alone(MIDDLE, 3))
    assert same(result(engine.submit(job(LONG[:6]))).hypotheses, alone(LONG[:6], 1))


def test_fault_32_who_has_gone_or_is_late_is_not_tried_again(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    engine, steps = start(FailingDecoder())
    first = occupied(engine, steps, STEADY)
    bad, gone = (engine.submit(job(source, beam_size=2)) for source in (BAD, MIDDLE))
    late = engine.submit(job(MIDDLE, beam_size=2, deadline=deadline_in(0.2)))
    with caplog.at_level(logging.CRITICAL):
        steps.let(2)
        steps.wait(2)  # the first one's next, and theirs
        gone.cancel()
        while not late.expired:
            pass
        steps.open()
        assert_failed(bad)
        with pytest.raises(ExpiredError):
            result(late)
    assert gone.future.cancelled()
    assert tokens(first) == STEADY
    assert steps.batches == [1, 3, 1]


def test_fault_32_who_comes_waits_until_all_that_failed_together_were_tried(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    engine, steps = start(FailingDecoder())
    first = occupied(engine, steps, STEADY)
    bad, *mates = (engine.submit(job(source, beam_size=2)) for source in (BAD, MIDDLE, OTHER))
    with caplog.at_level(logging.CRITICAL):
        steps.let(2)
        steps.wait(2)
        late = engine.submit(job(SHORT))
        steps.open()
        assert tokens(late) == SHORT
        assert [ticket.future.done() for ticket in (first, bad, mates[0])] == [True] * 3
        assert_failed(bad)
    assert [tokens(ticket) for ticket in (first, *mates)] == [STEADY, MIDDLE, OTHER]
    assert engine.counts.retries == 3


class HangingTwice(FailingDecoder):
    """Its second reading of one source does not come back."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.hangs, self.release = 0, threading.Event(), threading.Event()

    def encode(self, source_ids: Array, source_mask: Array, attention: bool = True) -> Memory:
        self.seen += len(source_ids) == 1 and source_ids[0, 0] == MIDDLE[0]
        if self.seen:
            self.hangs.set()
            assert self.release.wait(PATIENCE)
        return super().encode(source_ids, source_mask, attention)


def test_fault_34_who_is_being_tried_again_is_given_up_too(caplog: pytest.LogCaptureFixture) -> None:
    model = HangingTwice()
    steps = Gated(model)
    engine = Engine(steps, EngineLimits())
    first = occupied(engine, steps, STEADY)
    mates = [engine.submit(job(source, beam_size=2)) for source in (MIDDLE, BAD, OTHER)]
    with caplog.at_level(logging.CRITICAL):
        steps.open()
        assert model.hangs.wait(PATIENCE)
        assert tokens(first) == STEADY
        engine.give_up()
        for ticket in mates:
            with pytest.raises(EngineFailedError):
                result(ticket)
        with pytest.raises(EngineFailedError):
            engine.submit(job(SHORT))
    model.release.set()
    assert engine.stop(PATIENCE)


def test_results_that_cannot_be_put_together_are_one_requests_fault(
    start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, steps = start(Echo())
    results = Sentence.results

    def failing(sentence: Sentence) -> list[Hypothesis]:
        if sentence.attention == frozenset({"cross"}):
            raise MemoryError("secret of the runtime")
        return results(sentence)

    monkeypatch.setattr(Sentence, "results", failing)
    first = occupied(engine, steps, STEADY)
    large = engine.submit(job(MIDDLE, attention=frozenset({"cross"})))
    mate = engine.submit(job(OTHER))
    with caplog.at_level(logging.CRITICAL):
        steps.open()
        with pytest.raises(OutOfMemoryError):
            result(large)
    assert [tokens(ticket) for ticket in (first, mate)] == [STEADY, OTHER]


def test_a_ticket_ends_once_whoever_ends_it() -> None:
    for _ in range(200):
        ticket = Ticket(job(SHORT))
        ends = [
            threading.Thread(target=ticket.fail, args=(EngineError("late"),)),
            threading.Thread(target=ticket.finish, args=(Decoded(None, []),)),
        ]
        for thread in ends:
            thread.start()
        for thread in ends:
            thread.join()
        assert ticket.future.done()


class Small(Echo):
    """Has memory for so many rows at a time, and for no source with one of the tokens."""

    def __init__(self, rows: int, error: Exception) -> None:
        self._rows, self._error = rows, error

    def step(self, question: Question) -> Step:
        if question.target_ids.size > self._rows or (question.memory.tensors[0] == UNREADABLE).any():
            raise self._error
        return super().step(question)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("secret of the runtime"),
        RuntimeError("bfc_arena.cc: Failed to allocate memory for requested buffer of size 123456"),
    ],
    ids=["numpy", "runtime"],
)
def test_fault_33_a_batch_without_memory_is_split_and_what_has_none_alone_is_told(
    start: Start, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    engine, steps = start(Small(3, error))
    first = occupied(engine, steps, STEADY)
    fitting = [engine.submit(job(source)) for source in (MIDDLE, SHORT, OTHER)]
    large = engine.submit(job(BAD))
    with caplog.at_level(logging.CRITICAL):
        steps.open()
        with pytest.raises(OutOfMemoryError, match=r"^there is not enough memory for this request"):
            result(large)
        assert [tokens(ticket) for ticket in (first, *fitting)] == [STEADY, MIDDLE, SHORT, OTHER]
    assert outcome_of(OutOfMemoryError()).code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_store_that_cannot_let_go_costs_a_second_try_and_not_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    steps = GatedClinging(Echo())
    engine = Engine(steps, EngineLimits())
    first = occupied(engine, steps, STEADY)
    second = engine.submit(job(MIDDLE))
    steps.let()
    steps.wait()
    with caplog.at_level(logging.CRITICAL):
        second.cancel()
        steps.open()
        assert tokens(first) == STEADY
    assert engine.alive
    assert tokens(engine.submit(job(MIDDLE))) == MIDDLE
    assert engine.stop(PATIENCE)


@pytest.mark.parametrize(
    ("model", "said"),
    [(FailingEncoder(), "a batch of 1 could not be read"), (FailingDecoder(), "a step of 2 rows failed")],
    ids=["encoder", "decoder"],
)
def test_what_failed_is_in_the_log(start: Start, caplog: pytest.LogCaptureFixture, model: Echo, said: str) -> None:
    engine, steps = start(model)
    steps.open()
    assert_failed(engine.submit(job(BAD, 2)))
    assert said in caplog.text
    assert "secret of the runtime" in caplog.text


NOTHING_LEFT: dict[str, tuple[dict[str, Any], int]] = {
    "every word suppressed": ({"shortest": 2, "suppressed": EVERY_WORD}, 0),
    "no word twice": ({"shortest": 16, "no_repeat_ngram": 1}, len(EVERY_WORD)),
}
"""Options, and after how many tokens they rule out every other one."""


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("what", NOTHING_LEFT)
def test_options_that_rule_out_every_token_fail_alone(
    make_engine: MakeEngine, steps: Gated, what: str, beam_size: int
) -> None:
    choices, count = NOTHING_LEFT[what]
    options = SearchOptions(longest=16, beam_size=beam_size, **choices)
    engine = make_engine()
    occupied(engine, steps)
    told: list[int] = []
    mates = [engine.submit(job(LONG, beam_size, beam_size))]
    impossible = [
        engine.submit(job(MIDDLE, options=options)),
        engine.submit(job(MIDDLE, options=options, on_settled=lambda _, nodes: told.append(len(nodes)))),
    ]
    mates.append(engine.submit(job(LONG, beam_size, beam_size)))
    steps.open()
    message = f"^search: after {count} tokens every other one is ruled out: suppress fewer, or allow repeats$"
    for ticket in impossible:
        with pytest.raises(InvalidRequestError, match=message):
            result(ticket)
    for mate in mates:
        assert same(result(mate).hypotheses, alone(LONG, beam_size))
    assert len(told) == count + 1
    assert told == sorted(told)


@pytest.mark.parametrize("outside", [12, -1, 2**40])
@pytest.mark.parametrize("field", ["prefix", "suppressed"])
def test_fault_13_ids_that_the_model_does_not_have_are_refused_alone(
    make_engine: MakeEngine, steps: Gated, field: str, outside: int
) -> None:
    engine = make_engine()
    choices: dict[str, Any] = {field: (4, outside) if field == "prefix" else frozenset({outside})}
    first = occupied(engine, steps)
    message = rf"^{field}: {outside} is not from 0 to 11 \(ids of the vocabulary\)$"
    with pytest.raises(InvalidRequestError, match=message):
        engine.submit(job(MIDDLE, options=SearchOptions(longest=16, **choices)))
    mate = engine.submit(job(LONG))
    steps.open()
    assert [tokens(ticket) for ticket in (first, mate)] == [SHORT, LONG]
    assert steps.batches == [1, 1]


class NoNumber(Echo):
    """Cannot say how likely anything is after one of the tokens, as graphs whose values overflowed."""

    def step(self, question: Question) -> Step:
        step = super().step(question)
        bad = (question.memory.tensors[0] == UNREADABLE).any(1)[:, None]
        return dataclasses.replace(
            step,
            top_log_probabilities=np.where(bad[..., None], np.float32(np.nan), step.top_log_probabilities),
            next_log_probabilities=np.where(bad, np.float32(np.nan), step.next_log_probabilities),
        )


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("target", [None, SHORT], ids=["search", "score"])
def test_a_model_that_gives_no_number_is_no_fault_of_the_request(
    start: Start, caplog: pytest.LogCaptureFixture, beam_size: int, target: list[int] | None
) -> None:
    engine, steps = start(NoNumber())
    steps.open()
    assert_failed(engine.submit(job(BAD, beam_size, target=target)))
    assert "log-probabilities" in caplog.text
    assert tokens(engine.submit(job(MIDDLE, beam_size, target=target))) == (target or MIDDLE)
