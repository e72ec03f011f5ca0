"""Jobs for the tests of the engine, and what their results must be."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from model.search import Hypothesis, SearchOptions, search
from model.tokenizer import END
from serve.engine import Decoded, Engine, Job, Ticket
from tests.serve.running import PATIENCE
from tests.serve.steps import Echo, Gated

SHORT, MIDDLE, LONG = [4, END], [7, 8, 9, END], [5, 6, 7, 8, 9, 10, 11, 4, 5, END]

MakeEngine = Callable[..., Engine]


def job(source: Sequence[int], beam_size: int = 1, hypotheses: int = 1, **choices: Any) -> Job:
    options = SearchOptions(longest=16, beam_size=beam_size, hypotheses=hypotheses)
    return Job(source=list(source), options=options, **choices)


def result(ticket: Ticket) -> Decoded:
    return ticket.future.result(PATIENCE)


def occupied(engine: Engine, steps: Gated) -> Ticket:
    """Start a job that waits at its first step, so that whatever comes next queues."""
    ticket = engine.submit(job(SHORT))
    steps.wait()
    return ticket


def alone(source: list[int], beam_size: int) -> list[Hypothesis]:
    return search(Echo(), [source], [SearchOptions(longest=16, beam_size=beam_size, hypotheses=beam_size)])[0]


def same(left: list[Hypothesis], right: list[Hypothesis]) -> bool:
    """Equal in tokens and values, attention included, as far as both have hypotheses."""
    return all(
        (one.tokens, one.score, one.finish_reason) == (other.tokens, other.score, other.finish_reason)
        and np.array_equal(one.cross_attention, other.cross_attention)
        and np.array_equal(one.decoder_attention, other.decoder_attention)
        for one, other in zip(left, right, strict=False)
    )
