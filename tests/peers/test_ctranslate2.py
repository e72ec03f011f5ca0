"""Our search and CTranslate2's, on the same weights."""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from model.steps import Question, Step
from model.torch_steps import TorchStepModel
from model.transformer import Transformer
from model.vocabulary import END
from tests.peers.networks import (
    CLEAR,
    LONGEST,
    NETWORKS,
    PREFIXES,
    SEARCHES,
    SEEDS,
    TOLERANCES,
    Answer,
    Found,
    assert_near,
    assert_same,
    frequent,
    network,
    options,
    ours,
    sources,
    tokens_of,
)

pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed: pip install 'limelight[peers]'")

from tests.peers.translate import convert, decode, score

NO_PENALTY = 1e-9
"""Of length: as good as 0, without the early end that 0 has there."""

each_network = pytest.mark.parametrize(("kind", "seed"), NETWORKS)


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Converts a network once."""
    return functools.cache(lambda model: convert(model, tmp_path_factory.mktemp("peer")))


class Renormalised(TorchStepModel):
    """A network whose log-probabilities are those among the tokens that may come next, as CTranslate2 has them.

    Args:
        transformer: the network.
        suppressed: tokens that never come.
        shortest: fewest tokens, the end token among them.
    """

    def __init__(self, transformer: Transformer, suppressed: frozenset[int], shortest: int) -> None:
        super().__init__(transformer)
        self._suppressed, self._shortest = sorted(suppressed), shortest

    def step(self, question: Question) -> Step:
        found = super().step(replace(question, top=self.vocabulary))
        ids, values = found.top_ids, found.top_log_probabilities
        too_short = question.positions[..., None] + 1 < self._shortest
        ruled_out = np.isin(ids, self._suppressed) | ((ids == END) & too_short)
        values = values - np.log(np.where(ruled_out, 0.0, np.exp(values)).sum(-1, keepdims=True))
        return replace(found, top_ids=ids[..., : question.top], top_log_probabilities=values[..., : question.top])


@pytest.mark.parametrize("chosen", SEARCHES, ids=str)
@each_network
def test_greedy_and_beam_search(peers: Any, kind: str, seed: int, chosen: dict[str, Any]) -> None:
    model = network(kind, seed)
    penalty = chosen["length_penalty"] or NO_PENALTY
    found = ours(model, options(**chosen))
    assert_same(found, decode(peers(model), sources(), options(**chosen | {"length_penalty": penalty})))
    for source, best in zip(sources(), found.best, strict=True):
        scored = score(peers(model), [source] * len(best), [one.tokens for one in best])
        for one, values in zip(best, scored, strict=True):
            assert_near(one.log_probabilities, values[: len(one.tokens)], "log-probability")


@pytest.mark.parametrize("beam_size", [4, 16])
@each_network
def test_without_a_length_penalty_it_waits_for_the_best_to_end(
    peers: Any, kind: str, seed: int, beam_size: int
) -> None:
    """However many hypotheses are finished: so it finds what we find, or goes on to something better."""
    model = network(kind, seed)
    chosen = options(beam_size=beam_size, length_penalty=0.0)
    found = ours(model, chosen)
    for best, margin, sentence, theirs in zip(*found, decode(peers(model), sources(), chosen), strict=True):
        if margin <= CLEAR:
            continue
        if sentence.age == LONGEST or sentence.finished < beam_size:
            assert_same(Found([best], [margin], [sentence]), [theirs])
        assert best[0].score <= theirs[0].score + TOLERANCES["score"]


@pytest.mark.parametrize("longest", [1, 2, 5])
@pytest.mark.parametrize("beam_size", [1, 4, 16])
@pytest.mark.parametrize("kind", SEEDS)
def test_the_length_limit(peers: Any, kind: str, beam_size: int, longest: int) -> None:
    model = network(kind, SEEDS[kind][0])
    chosen = options(beam_size=beam_size, hypotheses=beam_size, longest=longest)
    assert_same(ours(model, chosen), decode(peers(model), sources(), chosen))


@pytest.mark.parametrize(("suppress", "shortest"), [(3, 1), (0, 6), (3, 4)])
@pytest.mark.parametrize("beam_size", [1, 4, 16])
@each_network
def test_suppressed_tokens_and_shortest_length(
    peers: Any, kind: str, seed: int, beam_size: int, suppress: int, shortest: int
) -> None:
    """It renormalises what is left, so our search is given log-probabilities that are renormalised, too."""
    model = network(kind, seed)
    free = options(beam_size=beam_size, hypotheses=beam_size)
    unconstrained = ours(model, free)
    chosen = replace(free, suppressed=frequent(unconstrained, suppress), shortest=shortest)
    found = ours(Renormalised(model, chosen.suppressed, shortest), chosen)
    assert_same(found, decode(peers(model), sources(), chosen))
    assert tokens_of(found) != tokens_of(unconstrained), "nothing was ruled out"


@pytest.mark.parametrize("size", [1, 2, 3])
@each_network
def test_no_run_of_tokens_twice(peers: Any, kind: str, seed: int, size: int) -> None:
    """In greedy search, where renormalising changes no choice. Its scores are renormalised ones: so are ours, here."""
    model = network(kind, seed)
    chosen = options(no_repeat_ngram=size, shortest=10, length_penalty=NO_PENALTY)
    found = ours(model, chosen)
    peer = peers(model)
    converted = []
    for source, (one,) in zip(sources(), found.best, strict=True):
        left = [1 - ruled_out(peer, source, one.tokens[:count], size, 10) for count in range(len(one.tokens))]
        converted.append([Answer(one.tokens, one.log_probability - sum(map(math.log, left)))])
    assert_same(found, decode(peer, sources(), chosen), converted)


@pytest.mark.parametrize("beam_size", [1, 4, 16])
@each_network
def test_a_forced_prefix(peers: Any, kind: str, seed: int, beam_size: int) -> None:
    """Its prefix costs nothing, and right after it no end token is allowed here, because of what `translate` says.

    That end token is renormalised away, by the same share for all hypotheses.
    """
    model = network(kind, seed)
    chosen = options(beam_size=beam_size, hypotheses=beam_size, shortest=4, length_penalty=NO_PENALTY)
    found = ours(model, chosen, PREFIXES)
    scored = score(peers(model), sources(), PREFIXES)
    converted = [
        [Answer(one.tokens, sum(one.log_probabilities[2:]) - math.log1p(-math.exp(end))) for one in best]
        for best, (_, _, end) in zip(found.best, scored, strict=True)
    ]
    assert_same(found, decode(peers(model), sources(), chosen, PREFIXES), converted)
    for best, (*values, _) in zip(found.best, scored, strict=True):
        for one in best:
            assert_near(one.log_probabilities[:2], values, "log-probability")


@pytest.mark.parametrize("penalty", [0.2, 1.0])
@pytest.mark.parametrize("beam_size", [1, 4, 8])
@pytest.mark.parametrize("seed", SEEDS["plain"])
def test_coverage(peers: Any, seed: int, beam_size: int, penalty: float) -> None:
    """Its coverage is of one matrix, ours of the mean of all layers and heads: the same where there is only one.

    One sentence at a time, because of what `translate` says of attention. Where the length limit ends a search, ours
    has more hypotheses to choose from.
    """
    model = network("plain", seed)
    chosen = options(beam_size=beam_size, hypotheses=beam_size, coverage_penalty=penalty)
    compared = 0
    for source in sources():
        found = ours(model, chosen, read=[source])
        (best,), (margin,), _ = found
        (theirs,) = decode(peers(model), [source], chosen)
        if margin > CLEAR and (beam_size == 1 or all(one.finish_reason == "stop" for one in best)):
            assert_same(found, [theirs])
            compared += 1
        elif margin > CLEAR:
            for one, other in zip(best, theirs, strict=True):
                assert one.score >= other.score - TOLERANCES["score"]
    assert compared


def ruled_out(peer: Any, source: Sequence[int], tokens: Sequence[int], size: int, shortest: int) -> float:
    """Probability of all that may not follow some tokens: what did so before, and an end too early."""
    runs = {tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)}
    before = tuple(tokens[len(tokens) - size + 1 :]) if size > 1 else ()
    banned = {run[-1] for run in runs if run[:-1] == before}
    targets = [[*tokens, token] for token in banned]
    values = [one[len(tokens)] for one in score(peer, [source] * len(targets), targets)]
    if len(tokens) + 1 < shortest:
        ((*_, end),) = score(peer, [source], [list(tokens)])
        values.append(end)
    return sum(math.exp(value) for value in values)
