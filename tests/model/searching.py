"""What the tests of the search share: sources, options, and what makes two answers the same."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from hypothesis import settings
from numpy.testing import assert_allclose

from model.options import UNWRITABLE
from model.search import Decoding, Hypothesis, SearchOptions, search
from model.steps import ALL_FAMILIES, Family, StepModel
from model.vocabulary import BEGIN, END
from tests.model.steps import Prefix, SeedModel

SOURCES = [[5, 6, 7, END], [8, END], [9, 4, 4, 4, 6, END], [END], [6, 5, END]]

FAMILIES: list[frozenset[Family]] = [frozenset(), frozenset({"cross"}), frozenset({"decoder"}), ALL_FAMILIES]

REPEATABLE = settings(deadline=None, derandomize=True, max_examples=100)
"""Property tests try the same examples every time."""

TOLERANCES = {"log-probability": 2e-5, "attention": 2e-6}
"""Largest difference between two ways of a network to the same hypothesis, with logits about as large as 10."""


def options(**choices: object) -> SearchOptions:
    return SearchOptions(**{"longest": 6, **choices})  # type: ignore[arg-type]


def alone(
    model: StepModel, source: Sequence[int], chosen: SearchOptions, attention: frozenset[Family] = ALL_FAMILIES
) -> list[Hypothesis]:
    return search(model, [source], [chosen], attention)[0]


def steps(decoding: Decoding) -> Iterator[int]:
    """Steps until every sentence is done, counted."""
    count = 0
    while decoding.sentences:
        decoding.step()
        count += 1
        yield count


def assert_same(actual: Sequence[Hypothesis], expected: Sequence[Hypothesis]) -> None:
    assert [one.tokens for one in actual] == [one.tokens for one in expected]
    for one, other in zip(actual, expected, strict=True):
        assert (one.score, one.log_probabilities, one.finish_reason) == (
            other.score,
            other.log_probabilities,
            other.finish_reason,
        )
        for mine, theirs in (
            (one.cross_attention, other.cross_attention),
            (one.decoder_attention, other.decoder_attention),
        ):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                np.testing.assert_array_equal(mine, theirs)


def assert_near(actual: Hypothesis, expected: Hypothesis) -> None:
    assert (actual.tokens, actual.finish_reason) == (expected.tokens, expected.finish_reason)
    for names, what in (
        (("log_probabilities", "score"), "log-probability"),
        (("cross_attention", "decoder_attention"), "attention"),
    ):
        for name in names:
            mine, theirs = getattr(actual, name), getattr(expected, name)
            assert (mine is None) == (theirs is None)
            if mine is not None:
                assert_allclose(mine, theirs, rtol=0, atol=TOLERANCES[what], err_msg=name)


Allowed = Callable[[Prefix, int], bool]
Scorer = Callable[[Prefix, float], float]


def beam_search_in_loops(
    model: SeedModel,
    source: Sequence[int],
    chosen: SearchOptions,
    allowed: Allowed = lambda tokens, token: True,
    score: Scorer | None = None,
) -> list[Prefix]:
    """One sentence, in plain lists: the n best answers of those that hold only what is allowed.

    Args:
        model: asked about one prefix at a time.
        source: the sentence.
        chosen: how it is decoded; what it says of constraints and coverage is not read.
        allowed: whether a token may follow others.
        score: of an answer and its total log-probability; by default without coverage.
    """
    scored = score or (lambda tokens, total: total / len(tokens) ** chosen.length_penalty)
    width, finished = chosen.beam_size, list[tuple[float, Prefix]]()
    live: list[tuple[float, Prefix]] = [(0.0, ())]
    for age in range(1, chosen.longest + 1):
        candidates = _ranked(
            (total + value, (*tokens, token))
            for total, tokens in live
            for token, value in model.next_log_probabilities(tuple(source), (BEGIN, *tokens)).items()
            if token not in UNWRITABLE and allowed(tokens, token)
        )
        finished += [(scored(tokens, total), tokens) for total, tokens in candidates[:width] if tokens[-1] == END]
        live = [one for one in candidates if one[1][-1] != END][:width]
        if age == chosen.longest:
            finished += [(scored(tokens, total), tokens) for total, tokens in live]
        best = _ranked(finished)[: chosen.hypotheses]
        bound = live[0][0] / chosen.longest**chosen.length_penalty if live else 0.0
        settled = len(best) == chosen.hypotheses and best[-1][0] >= bound
        if age == chosen.longest or not live or len(finished) >= width or settled:
            break
    return [tokens for _, tokens in _ranked(finished)[: chosen.hypotheses]]


def _ranked(scored: Iterable[tuple[float, Prefix]]) -> list[tuple[float, Prefix]]:
    return sorted(scored, key=lambda one: -one[0])
