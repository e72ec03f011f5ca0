"""The coverage term of a score (Wu et al. 2016, section 7), written out again in plain floats."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from model.hypotheses import LEAST_COVERAGE
from model.search import Decoding, search
from model.steps import Array, Family, pad
from model.vocabulary import BEGIN
from tests.model.searching import FAMILIES, SOURCES, alone, assert_same, beam_search_in_loops, options
from tests.model.steps import Prefix, SeedModel, stamp

SEEDS = range(10)


class LookingModel(SeedModel):
    """Every prefix looks at the source in a way of its own, with two layers of three heads."""

    def cross(self, source: Sequence[int], prefix: Sequence[int]) -> Array:
        draw = np.random.default_rng([*source, int(stamp(prefix) * 2**32)])
        return draw.dirichlet([0.2] * len(source), (2, 3))


class BlindModel(SeedModel):
    """Looks at the first source token and at no other."""

    def cross(self, source: Sequence[int], prefix: Sequence[int]) -> Array:  # noqa: ARG002
        return np.eye(1, len(source))[None]


def coverage(model: SeedModel, source: Sequence[int], tokens: Sequence[int]) -> float:
    """Sum over source tokens of log(min(1, attention received))."""
    received = [0.0] * len(source)
    for index in range(len(tokens)):
        weights = model.cross(source, (BEGIN, *tokens[:index]))
        for token in range(len(source)):
            received[token] += math.fsum(weights[:, :, token].ravel().tolist()) / weights[:, :, token].size
    return math.fsum(math.log(min(1.0, max(one, LEAST_COVERAGE))) for one in received)


def score_of(model: SeedModel, source: Sequence[int], tokens: Prefix, penalty: float, length_penalty: float) -> float:
    likely: float = sum(model.forced(source, tokens)) / len(tokens) ** length_penalty
    return likely + penalty * coverage(model, source, tokens)


@pytest.mark.parametrize("beam_size", [1, 4])
@pytest.mark.parametrize(("penalty", "length_penalty"), [(0.2, 1.0), (1.0, 0.0), (10.0, 2.0)])
def test_scores_follow_the_formula(beam_size: int, penalty: float, length_penalty: float) -> None:
    for seed, source in zip(SEEDS, SOURCES * 2, strict=True):
        model = LookingModel(6, seed, end=-1)
        chosen = options(
            beam_size=beam_size, hypotheses=beam_size, coverage_penalty=penalty, length_penalty=length_penalty
        )
        found = alone(model, source, chosen)
        expected = [score_of(model, source, tuple(one.tokens), penalty, length_penalty) for one in found]
        assert [one.score for one in found] == pytest.approx(expected, abs=1e-9)
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
        for one in found:
            assert one.log_probabilities == model.forced(source, one.tokens)


def test_the_best_covered_of_all_answers_is_found() -> None:
    changed = 0
    for seed in SEEDS:
        model = LookingModel(2, seed)
        chosen = options(longest=4, beam_size=16, hypotheses=3, coverage_penalty=0.5)
        scored = {
            tuple(tokens): score_of(model, SOURCES[0], tuple(tokens), 0.5, 1.0) for tokens in model.answers(longest=4)
        }
        found = [tuple(one.tokens) for one in alone(model, SOURCES[0], chosen)]
        assert found == sorted(scored, key=lambda tokens: -scored[tokens])[:3], seed
        free = alone(model, SOURCES[0], options(longest=4, beam_size=16, hypotheses=3))
        changed += found != [tuple(one.tokens) for one in free]
    assert changed > len(SEEDS) / 2


@pytest.mark.parametrize("beam_size", [2, 3, 8])
def test_covered_beams_are_what_the_loops_find(beam_size: int) -> None:
    for seed, source in zip(SEEDS, SOURCES * 2, strict=True):
        model = LookingModel(6, seed)
        chosen = options(beam_size=beam_size, hypotheses=beam_size, coverage_penalty=0.3)

        def scored(tokens: Prefix, total: float, model: SeedModel = model, source: Sequence[int] = source) -> float:
            return total / len(tokens) + 0.3 * coverage(model, source, tokens)

        found = [tuple(one.tokens) for one in alone(model, source, chosen)]
        assert found == beam_search_in_loops(model, source, chosen, score=scored)


def test_what_nobody_looked_at_costs_much_and_not_everything() -> None:
    (one,) = alone(BlindModel(4), SOURCES[0], options(coverage_penalty=1.0))
    likely = sum(one.log_probabilities) / len(one.tokens)
    assert one.score == pytest.approx(likely + 3 * math.log(LEAST_COVERAGE))


@pytest.mark.parametrize("attention", FAMILIES, ids=sorted)
def test_coverage_counts_whatever_attention_was_asked_for(attention: frozenset[Family]) -> None:
    chosen = options(beam_size=3, hypotheses=3, coverage_penalty=1.0)
    everything = alone(LookingModel(6, end=-1), SOURCES[0], chosen)
    for one, other in zip(alone(LookingModel(6, end=-1), SOURCES[0], chosen, attention), everything, strict=True):
        assert (one.tokens, one.score) == (other.tokens, other.score)
        assert (one.cross_attention is not None) == ("cross" in attention)
        assert (one.decoder_attention is not None) == ("decoder" in attention)


def test_only_those_who_asked_are_penalised() -> None:
    model = LookingModel(6, end=-1)
    chosen = [options(beam_size=3, coverage_penalty=penalty) for penalty in (0.0, 1.0, 0.0, 0.2, 5.0)]
    for attention in FAMILIES:
        together = search(model, SOURCES, chosen, attention)
        for source, own, found in zip(SOURCES, chosen, together, strict=True):
            assert_same(found, alone(LookingModel(6, end=-1), source, own, attention))


def test_padding_needs_no_cover() -> None:
    model = LookingModel(6, end=-1)
    running = Decoding(model, 1)
    chosen = options(coverage_penalty=2.0)
    short, _ = running.join(model.encode(*pad([SOURCES[1], [4] * 30])), [0, 1], [chosen] * 2)
    while not short.done:
        running.step()
    (found,) = short.results()
    assert found.score == pytest.approx(score_of(model, SOURCES[1], tuple(found.tokens), 2.0, 1.0), abs=1e-9)
