"""Several greedy steps in one call give what single steps give, whoever joins and leaves between the calls."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import NotANumberError
from model.search import LEAVE_TOGETHER, Decoding, Sentence, search
from model.steps import Family, GreedySteps, Question, pad
from model.vocabulary import END
from tests.model.searching import FAMILIES, REPEATABLE, SOURCES, alone, assert_same, options
from tests.model.steps import RowAhead, RowModel, SeedAhead, SeedModel

CROSS: frozenset[Family] = frozenset({"cross"})

PAIRS: list[tuple[Callable[..., SeedModel], Callable[..., SeedAhead | RowAhead]]] = [
    (SeedModel, SeedAhead),
    (RowModel, RowAhead),
]
"""A model, and the same that takes several steps."""


@pytest.mark.parametrize(("single", "ahead"), PAIRS)
@pytest.mark.parametrize("attention", FAMILIES)
@pytest.mark.parametrize("end", [-2.0, 0.0])
def test_a_search_finds_the_same_in_fewer_calls(
    single: Callable[..., SeedModel],
    ahead: Callable[..., SeedAhead | RowAhead],
    attention: frozenset[Family],
    end: float,
) -> None:
    steps = calls = 0
    for seed, longest in itertools.product(range(6), (1, 2, 7, 40)):
        model, chosen = ahead(6, seed, end), [options(longest=longest)] * len(SOURCES)
        found = search(model, SOURCES, chosen, attention)
        for one, expected in zip(found, search(single(6, seed, end), SOURCES, chosen, attention), strict=True):
            assert_same(one, expected)
        steps += len(model.widths)
        calls += len(model.widths) - sum(model.taken) + len(model.taken)
    assert calls < 0.75 * steps


@REPEATABLE
@given(
    st.sampled_from(PAIRS),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30), st.sampled_from(FAMILIES)), min_size=1, max_size=12),
    st.lists(st.integers(1, 20), min_size=1, max_size=9),
    st.lists(st.integers(0, 40), max_size=3),
    st.integers(0, 99),
)
def test_sentences_join_and_leave_between_calls_as_between_steps(
    pair: tuple[Callable[..., SeedModel], Callable[..., SeedAhead]],
    arriving: list[tuple[int, int, frozenset[Family]]],
    most: list[int],
    given_up: list[int],
    seed: int,
) -> None:
    single, ahead = pair
    model, waiting, calls = ahead(6, seed, -2.0), list(enumerate(arriving)), itertools.cycle(most)
    running, joined, call = Decoding(model, 1), dict[int, Sentence](), 0
    while waiting or running.sentences:
        while waiting and waiting[0][1][0] <= call % 4:
            index, (_, longest, attention) = waiting.pop(0)
            memory = model.encode(*pad([SOURCES[index % 5]]))
            [joined[index]] = running.join(memory, [0], [options(longest=longest)], [attention])
        if call in given_up and running.sentences:
            running.leave(running.sentences[:1])
        if running.sentences:
            running.step(next(calls))
        call += 1
    for index, (_, longest, attention) in enumerate(arriving):
        if joined[index].finished:
            expected = alone(single(6, seed, -2.0), SOURCES[index % 5], options(longest=longest), attention)
            assert_same(joined[index].results(), expected)
        else:
            assert given_up


@pytest.mark.parametrize(
    "choices",
    [{"suppressed": frozenset({5})}, {"prefix": (5,)}, {"shortest": 3}, {"no_repeat_ngram": 2}, {"beam_size": 2}],
    ids=str,
)
def test_where_something_is_to_be_decided_between_steps_they_are_taken_singly(choices: dict[str, object]) -> None:
    model = SeedAhead(6, seed=2, end=-1)
    found = alone(model, SOURCES[0], options(**choices))
    assert_same(found, alone(SeedModel(6, seed=2, end=-1), SOURCES[0], options(**choices)))
    assert model.taken == []


@pytest.mark.parametrize("count", [1, 5, 20])
def test_a_call_ends_once_enough_sentences_have(count: int) -> None:
    model = SeedAhead(6, seed=1, end=0.5)
    running, ends = Decoding(model, 1), max(1, count // LEAVE_TOGETHER)
    sources = [[*SOURCES[index % 5][:-1], 4 + index % 6, END] for index in range(count)]
    running.join(model.encode(*pad(sources)), range(count), [options(longest=40)] * count)
    ages = sorted(len(alone(model, source, options(longest=40))[0].tokens) for source in sources)
    advanced = running.step(40)
    assert max(sentence.age for sentence in advanced) == ages[ends - 1]
    assert sum(sentence.done for sentence in advanced) == sum(age <= ages[ends - 1] for age in ages)


class Overflowing(SeedAhead):
    """Has no number for one sentence's third step."""

    def greedy(self, question: Question, steps: int, fewest: int) -> GreedySteps:
        made = super().greedy(question, steps, fewest)
        values = made.log_probabilities.copy()
        values[2, 1] = np.nan
        return replace(made, log_probabilities=values)


def test_what_is_no_number_is_told_of() -> None:
    with pytest.raises(NotANumberError, match="in 1 of 3 rows"):
        search(Overflowing(6, end=-50), SOURCES[:3], [options(longest=8)] * 3, CROSS)
