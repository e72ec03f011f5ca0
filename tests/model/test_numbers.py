"""A network that gives no number is told of, however it is asked; what is merely impossible is not."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest

from model.errors import NotANumberError
from model.forced import score
from model.search import search
from model.steps import Array, Question, Step
from model.vocabulary import BEGIN, END
from tests.model.searching import SOURCES, alone, assert_same, options
from tests.model.steps import Prefix, SeedModel

Where = Callable[[Question, list[list[Prefix]]], Array]
"""Which rows [batch query] have no numbers."""


def nowhere(question: Question, _: list[list[Prefix]]) -> Array:
    return np.zeros(question.target_ids.shape, bool)


class Overflowing(SeedModel):
    """Has no numbers for some rows, in what is likeliest or in what it is asked about besides."""

    def __init__(self, top: Where = nowhere, following: Where = nowhere) -> None:
        super().__init__(4, seed=3, end=-3)
        self._top, self._following = top, following

    def step(self, question: Question) -> Step:
        step, prefixes = super().step(question), self.prefixes(question)
        top, following = step.top_log_probabilities.copy(), step.next_log_probabilities.copy()
        top[self._top(question, prefixes)] = np.nan
        following[self._following(question, prefixes)] = np.nan
        return dataclasses.replace(step, top_log_probabilities=top, next_log_probabilities=following)


def at_length(length: int) -> Where:
    """Rows that have read so many tokens, the begin token among them."""
    return lambda _, prefixes: np.array([[len(prefix) == length for prefix in row] for row in prefixes])


def of_query(sentence: int, query: int) -> Where:
    """One row of one sentence."""

    def only(question: Question, _: list[list[Prefix]]) -> Array:
        found = np.zeros(question.target_ids.shape, bool)
        found[sentence, query] = True
        return found

    return only


CHOICES: dict[str, dict[str, object]] = {
    "greedy": {},
    "beam": {"beam_size": 3},
    "constrained": {"suppressed": frozenset({5})},
}


@pytest.mark.parametrize("what", CHOICES)
@pytest.mark.parametrize("age", [0, 2])
def test_a_search_says_when_there_is_no_number(what: str, age: int) -> None:
    message = rf"^after {age} tokens of an answer the model's log-probabilities are no numbers, in "
    with pytest.raises(NotANumberError, match=message):
        search(Overflowing(at_length(age + 1)), [SOURCES[0]], [options(shortest=4, **CHOICES[what])])


def test_one_sentence_without_numbers_is_enough() -> None:
    with pytest.raises(NotANumberError, match="in 1 of 3 rows"):
        search(Overflowing(of_query(1, 0)), SOURCES[:3], [options()] * 3)


def test_the_likelihood_of_a_forced_token_counts_too() -> None:
    model = Overflowing(following=at_length(2))
    with pytest.raises(NotANumberError, match="after 1 tokens"):
        search(model, [SOURCES[0]], [options(prefix=(4, 5))])


def test_dead_hypotheses_may_have_no_numbers() -> None:
    """A beam begins with one hypothesis, and while a prefix is forced it has no other: the rest of the rows is dead."""
    dead = list[int]()

    def dead_rows(_: Question, prefixes: list[list[Prefix]]) -> Array:
        found = np.array([[row > 0 and prefix[-1] == BEGIN for row, prefix in enumerate(line)] for line in prefixes])
        dead.append(int(found.sum()))
        return found

    chosen = options(beam_size=3, hypotheses=3, prefix=(4, 6))
    assert_same(alone(Overflowing(dead_rows, dead_rows), SOURCES[0], chosen), alone(Overflowing(), SOURCES[0], chosen))
    assert dead[::2][:4] == [2, 2, 2, 0]


def test_what_is_impossible_is_a_number() -> None:
    class Certain(SeedModel):
        def next_log_probabilities(self, source: Prefix, prefix: Prefix) -> dict[int, float]:
            likely = super().next_log_probabilities(source, prefix)
            return {token: 0.0 if rank == 0 else -math.inf for rank, token in enumerate(likely)}

    for beam_size in (1, 3):
        [best] = alone(Certain(4, end=-3), SOURCES[0], options(beam_size=beam_size))
        assert best.log_probability == 0
    [scored] = score(Certain(4), [SOURCES[0]], [[9, 4, END]])
    assert scored.log_probability == -math.inf


def test_a_score_says_when_there_is_no_number() -> None:
    sources, targets = SOURCES[:2], [[4, 5, END], [6, END]]
    expected = score(SeedModel(4, seed=3, end=-3), sources, targets)
    found = score(Overflowing(following=of_query(1, 2)), sources, targets)
    assert [one.log_probabilities for one in found] == [one.log_probabilities for one in expected]
    message = r"^the model's log-probabilities of 1 of 5 given tokens are no numbers"
    with pytest.raises(NotANumberError, match=message):
        score(Overflowing(following=of_query(1, 1)), sources, targets)
