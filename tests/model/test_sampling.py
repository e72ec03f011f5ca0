"""Drawn answers against the model's exact probabilities; every seed is fixed, so no test fails by chance."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from model.options import Sampling, SearchOptions
from model.search import Hypothesis, search
from model.vocabulary import BEGIN, END
from tests.model.searching import SOURCES, alone, assert_same, options
from tests.model.steps import SeedModel

DRAWS = 4000
SOURCE = SOURCES[0]

SAMPLINGS = {
    "as it is": Sampling(),
    "cold": Sampling(temperature=0.5),
    "hot": Sampling(temperature=3.0),
    "likeliest three": Sampling(top_k=3),
    "more than there are": Sampling(top_k=500),
    "nucleus": Sampling(top_p=0.7),
    "small nucleus": Sampling(top_p=0.2),
    "all together": Sampling(temperature=1.7, top_k=5, top_p=0.8),
}


def drawn(model: SeedModel, count: int, sampling: Sampling, **choices: object) -> list[Hypothesis]:
    """As many answers to the same source, each with a seed of its own."""
    chosen = [options(sampling=seeded(sampling, seed), **choices) for seed in range(count)]
    return [one for (one,) in search(model, [SOURCE] * count, chosen, frozenset())]


def seeded(sampling: Sampling, seed: int) -> Sampling:
    return Sampling(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, seed=seed)


def exact(log_probabilities: dict[int, float], sampling: Sampling) -> dict[int, float]:
    """Probability of each token that may be drawn, likeliest first, by the options' own descriptions."""
    ranked = sorted(log_probabilities.items(), key=lambda item: -item[1])[: sampling.top_k or None]
    weights = {token: math.exp(value / sampling.temperature) for token, value in ranked if value > -math.inf}
    total, kept, gathered = sum(weights.values()), dict[int, float](), 0.0
    for token, weight in weights.items():
        if gathered >= sampling.top_p:
            break
        kept[token] = weight / total
        gathered += weight / total
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


def assert_distributed(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> None:
    """Pearson's chi-square, within four standard deviations of its mean; rare outcomes are counted together."""
    assert counts.keys() <= expected.keys()
    total = sum(counts.values())
    common = {outcome for outcome, probability in expected.items() if probability * total >= 5}
    pairs = [(counts[outcome], expected[outcome] * total) for outcome in common]
    rare = total - sum(count for count, _ in pairs)
    rarely = total - sum(share for _, share in pairs)
    if rarely > 5:
        pairs.append((rare, rarely))
    distance = sum((count - share) ** 2 / share for count, share in pairs)
    freedom = len(pairs) - 1
    assert distance <= freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("what", SAMPLINGS)
def test_tokens_are_drawn_by_their_probability(what: str) -> None:
    model, sampling = SeedModel(9, seed=5, unwritable=-20.0), SAMPLINGS[what]
    following = model.next_log_probabilities(tuple(SOURCE), (BEGIN,))
    expected = exact({token: value for token, value in following.items() if token in {END, *model.words}}, sampling)
    counts = Counter(tuple(one.tokens) for one in drawn(model, DRAWS, sampling, longest=1))
    assert_distributed(counts, {(token,): probability for token, probability in expected.items()})


def test_each_token_is_drawn_given_those_before_it() -> None:
    model, sampling = SeedModel(3, seed=2), Sampling(temperature=1.3)
    expected: dict[tuple[int, ...], float] = {}
    for first, probability in exact(model.next_log_probabilities(tuple(SOURCE), (BEGIN,)), sampling).items():
        if first == END:
            expected[first,] = probability
            continue
        second = exact(model.next_log_probabilities(tuple(SOURCE), (BEGIN, first)), sampling)
        expected |= {(first, token): probability * share for token, share in second.items()}
    counts = Counter(tuple(one.tokens) for one in drawn(model, DRAWS, sampling, longest=2))
    assert_distributed(counts, expected)


@pytest.mark.parametrize("what", ["likeliest three", "small nucleus", "all together"])
def test_nothing_unlikelier_is_ever_drawn(what: str) -> None:
    model, sampling = SeedModel(9, seed=1, end=-2), SAMPLINGS[what]
    kinds = set()
    for one in drawn(model, 200, sampling, longest=8):
        for index, token in enumerate(one.tokens):
            following = model.next_log_probabilities(tuple(SOURCE), (BEGIN, *one.tokens[:index]))
            assert token in exact(following, sampling)
        kinds.add(tuple(one.tokens))
    assert len(kinds) > 1


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.01), Sampling(top_k=1), Sampling(top_p=1e-6)], ids=str)
def test_the_narrowest_sampling_is_greedy_search(sampling: Sampling) -> None:
    model = SeedModel(9, seed=3, end=-2)
    (greedy,) = alone(model, SOURCE, options(longest=12))
    assert len(greedy.tokens) > 3
    assert [one.tokens for one in drawn(model, 20, sampling, longest=12)] == [greedy.tokens] * 20


def test_the_seed_alone_decides() -> None:
    model = SeedModel(9, seed=3, end=-2)
    chosen = [options(longest=10, sampling=Sampling(seed=seed)) for seed in (7, 8, 7, 9, 2**63 - 1)]
    together = search(model, [SOURCES[0]] * 5, chosen)
    assert_same(together[0], together[2])
    assert len({tuple(found[0].tokens) for found in together}) == 4
    for own, found in zip(chosen, together, strict=True):
        assert_same(found, alone(SeedModel(9, seed=3, end=-2), SOURCES[0], own))


def test_batch_mates_do_not_change_what_is_drawn() -> None:
    chosen: Sequence[SearchOptions] = [
        options(longest=12, sampling=Sampling(seed=1, top_k=2)),
        options(longest=12),
        options(longest=12, sampling=Sampling(seed=1), suppressed=frozenset({4, 5})),
        options(longest=12, no_repeat_ngram=1),
        options(longest=12, sampling=Sampling(seed=1, top_p=0.5), prefix=(4, 5)),
    ]
    together = search(SeedModel(20, end=-2), SOURCES, chosen)
    for source, own, found in zip(SOURCES, chosen, together, strict=True):
        assert_same(found, alone(SeedModel(20, end=-2), source, own))


@pytest.mark.parametrize("what", SAMPLINGS)
def test_log_probabilities_and_scores_are_the_models_own(what: str) -> None:
    model = SeedModel(6, seed=4, end=-2)
    for one in drawn(model, 50, SAMPLINGS[what], length_penalty=0.5):
        assert one.log_probabilities == model.forced(SOURCE, one.tokens)
        assert one.score == pytest.approx(sum(one.log_probabilities) / len(one.tokens) ** 0.5)


def test_what_is_ruled_out_is_not_counted_among_the_likeliest() -> None:
    model = SeedModel(9, seed=6)
    following = model.next_log_probabilities(tuple(SOURCE), (BEGIN,))
    suppressed = [token for token in following if token != END][:2]
    allowed = {token: value for token, value in following.items() if token not in {*suppressed, END}}
    sampling = Sampling(top_k=3, top_p=0.9)
    found = drawn(model, DRAWS, sampling, longest=2, shortest=2, suppressed=frozenset(suppressed))
    counts = Counter(tuple(one.tokens[:1]) for one in found)
    assert_distributed(counts, {(token,): share for token, share in exact(allowed, sampling).items()})


def test_a_prefix_is_not_drawn() -> None:
    model = SeedModel(9, seed=6, end=-3)
    found = drawn(model, 100, Sampling(), longest=6, prefix=(12, 4))
    assert {tuple(one.tokens[:2]) for one in found} == {(12, 4)}
    assert len({tuple(one.tokens) for one in found}) > 50
    assert np.all([one.log_probabilities[:2] == model.forced(SOURCE, (12, 4)) for one in found])
