"""Jobs for the tests of the engine, and what their results must be."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from model.search import Hypothesis, SearchOptions, search
from model.steps import ALL_FAMILIES, Family
from model.vocabulary import BEGIN, END, PAD
from serve.engine import Engine
from serve.jobs import Decoded, Job, Ticket
from tests.serve.running import PATIENCE
from tests.serve.steps import Echo, Gated

SHORT, MIDDLE, LONG = [4, END], [7, 8, 9, END], [5, 6, 7, 8, 9, 10, 11, 4, 5, END]
EVERY_WORD = frozenset(range(Echo.vocabulary)) - {PAD, BEGIN, END}
"""All tokens that an answer could have, but the end token."""

MakeEngine = Callable[..., Engine]


def job(
    source: Sequence[int],
    beam_size: int = 1,
    hypotheses: int = 1,
    attention: frozenset[Family] = ALL_FAMILIES,
    **choices: Any,
) -> Job:
    choices.setdefault("options", SearchOptions(longest=16, beam_size=beam_size, hypotheses=hypotheses))
    return Job(source=list(source), attention=attention, **choices)


def submitted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that an engine is given from now on."""
    seen, submit = list[Job](), engine.submit

    def told(job: Job) -> Ticket:
        seen.append(job)
        return submit(job)

    monkeypatch.setattr(engine, "submit", told)
    return seen


def result(ticket: Ticket) -> Decoded:
    return ticket.future.result(PATIENCE)


def tokens(ticket: Ticket) -> list[int]:
    """Of the best hypothesis."""
    return result(ticket).hypotheses[0].tokens


def occupied(engine: Engine, steps: Gated, source: Sequence[int] = SHORT) -> Ticket:
    """Start a job that waits at its first step, so that whatever comes next queues."""
    ticket = engine.submit(job(source))
    steps.wait()
    return ticket


def alone(source: list[int], beam_size: int) -> list[Hypothesis]:
    return search(Echo(), [source], [SearchOptions(longest=16, beam_size=beam_size, hypotheses=beam_size)])[0]


def encoded_alone(decoded: Decoded, length: int) -> bool:
    """Encoder attention is what `Echo` gives to a source of so many tokens by itself."""
    return _equal(decoded.encoder_attention, np.full((1, 1, length, length), np.float32(1 / length)))


def same(left: list[Hypothesis], right: list[Hypothesis]) -> bool:
    """Equal in tokens and values, attention included, as far as both have hypotheses."""
    return all(
        (one.tokens, one.score, one.finish_reason) == (other.tokens, other.score, other.finish_reason)
        and one.log_probabilities == other.log_probabilities
        and _equal(one.cross_attention, other.cross_attention)
        and _equal(one.decoder_attention, other.decoder_attention)
        for one, other in zip(left, right, strict=False)
    )


def _equal(left: Any, right: Any) -> bool:
    return left is not None and np.array_equal(left, right)
