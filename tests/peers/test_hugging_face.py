"""Our search and Hugging Face's `generate`, on the same weights."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch

from model.forced import score
from model.steps import ALL_FAMILIES, pad
from model.torch_steps import TorchStepModel
from model.vocabulary import BEGIN, END, PAD
from tests.peers.networks import (
    CLEAR,
    LONGEST,
    NETWORKS,
    PREFIXES,
    SEARCHES,
    TOLERANCES,
    VOCABULARY,
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

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'limelight[peers]'")

from tests.peers.hugging_face import convert, cross_attention, decode, logits

CONSTRAINTS: dict[str, dict[str, Any]] = {
    "at least six tokens": {"shortest": 6},
    "exactly eight tokens": {"shortest": 8, "longest": 8},
    "one token": {"longest": 1},
    "at most four tokens": {"longest": 4},
    "no token twice": {"no_repeat_ngram": 1},
    "no pair twice": {"no_repeat_ngram": 2, "shortest": 9},
    "all together": {"suppressed": frozenset({5, 7}), "no_repeat_ngram": 2, "shortest": 5, "longest": 9},
}

each_network = pytest.mark.parametrize(("kind", "seed"), NETWORKS)
one_of_each = pytest.mark.parametrize(("kind", "seed"), [("post", 10), ("pre", 3), ("plain", 24)])


@each_network
def test_the_network_is_the_same(kind: str, seed: int) -> None:
    """In float64, where a difference is a difference and no rounding."""
    model, peer = copy.deepcopy(network(kind, seed)).double(), copy.deepcopy(convert(network(kind, seed))).double()
    ids, mask = pad(sources())
    targets = [source[:-1] for source in sources()]
    read, _ = pad([[BEGIN, *target] for target in targets])
    with torch.inference_mode():
        output = model(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(read))
    found = logits(peer, sources(), targets)
    for index, target in enumerate(targets):
        real = slice(len(target) + 1)
        assert_near(output.logits[index, real], found[index, real], "logit")


@pytest.mark.parametrize("chosen", SEARCHES, ids=str)
@each_network
def test_greedy_and_beam_search(kind: str, seed: int, chosen: dict[str, Any]) -> None:
    model = network(kind, seed)
    assert_same(ours(model, options(**chosen)), decode(convert(model), sources(), options(**chosen)))


@pytest.mark.parametrize("beam_size", [1, 8])
@pytest.mark.parametrize("what", CONSTRAINTS)
@one_of_each
def test_constraints(kind: str, seed: int, what: str, beam_size: int) -> None:
    model = network(kind, seed)
    free = options(beam_size=beam_size, hypotheses=beam_size)
    chosen = options(beam_size=beam_size, hypotheses=beam_size, **CONSTRAINTS[what])
    found = ours(model, chosen)
    assert_same(found, decode(convert(model), sources(), chosen))
    assert tokens_of(found) != tokens_of(ours(model, free)), "the constraint ruled nothing out"


@pytest.mark.parametrize("beam_size", [1, 4, 16])
@each_network
def test_the_favourite_tokens_suppressed(kind: str, seed: int, beam_size: int) -> None:
    model = network(kind, seed)
    free = options(beam_size=beam_size, hypotheses=beam_size)
    chosen = replace(free, suppressed=frequent(ours(model, free), 3))
    assert len(chosen.suppressed) == 3
    assert_same(ours(model, chosen), decode(convert(model), sources(), chosen))


@pytest.mark.parametrize("beam_size", [1, 4])
@pytest.mark.parametrize(("kind", "seed"), [("post", 10), ("plain", 24)])
def test_what_stands_for_no_text_is_left_out(kind: str, seed: int, beam_size: int) -> None:
    model = network(kind, seed, unwritable=3.0)
    peer, chosen = convert(model), options(beam_size=beam_size, hypotheses=beam_size)
    found = ours(model, chosen)
    best = [hypotheses[0].tokens for hypotheses in found.best]
    assert {PAD, BEGIN} & set(logits(peer, sources(), best).argmax(-1).flatten().tolist()), "they were never likely"
    assert_same(found, decode(peer, sources(), chosen))


@pytest.mark.parametrize("what", [None, "at least six tokens", "no token twice", "all together"])
@pytest.mark.parametrize("beam_size", [1, 4, 16])
@pytest.mark.parametrize(("kind", "seed"), [("post", 28), ("pre", 9)])
def test_a_forced_prefix(kind: str, seed: int, beam_size: int, what: str | None) -> None:
    """Without a length penalty, because the prefix counts for our lengths and not for theirs."""
    model = network(kind, seed)
    peer, constraints = convert(model), CONSTRAINTS[what] if what else {}
    chosen = options(beam_size=beam_size, hypotheses=beam_size, length_penalty=0.0, **constraints)
    found = ours(model, chosen, PREFIXES)
    after = [
        [Answer(one.tokens, sum(one.log_probabilities[2:]), one.log_probabilities[2:]) for one in best]
        for best in found.best
    ]
    assert_same(found, decode(peer, sources(), chosen, PREFIXES), after)
    for best, values in zip(found.best, log_probabilities(peer, PREFIXES), strict=True):
        for one in best:
            assert_near(one.log_probabilities[:2], values, "log-probability")
            assert_near(one.score, sum(one.log_probabilities), "score")


@pytest.mark.parametrize("early_stopping", [False, "never"])
@pytest.mark.parametrize("chosen", SEARCHES[1:], ids=str)
@pytest.mark.parametrize(("kind", "seed"), [("post", 2), ("pre", 29), ("plain", 39)])
def test_whoever_goes_on_longer_finds_the_same_or_better(
    kind: str, seed: int, chosen: dict[str, Any], early_stopping: Literal[False, "never"]
) -> None:
    """Ours ends as soon as `beam_size` hypotheses are finished, theirs only when it takes the live ones for worse.

    So theirs has seen all that ours has, and maybe more. Where ours ended by itself before there were so many, because
    no live hypothesis could come among the n best, or at the length limit, there is nothing better to be found.
    """
    model = network(kind, seed)
    expected = decode(convert(model), sources(), options(**chosen), early_stopping=early_stopping)
    found = ours(model, options(**chosen))
    for best, margin, sentence, theirs in zip(*found, expected, strict=True):
        if margin <= CLEAR:
            continue
        if sentence.age == LONGEST or sentence.finished < chosen["beam_size"]:
            assert_same(Found([best], [margin], [sentence]), [theirs])
        for one, other in zip(best, theirs, strict=True):
            assert one.score <= other.score + TOLERANCES["score"]


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("hypotheses", [1, 3])
@one_of_each
def test_ending_when_nothing_can_win_changes_no_answer(
    kind: str, seed: int, hypotheses: int, length_penalty: float
) -> None:
    """Theirs, told to stop at `beam_size` finished hypotheses, does not look whether it could stop before."""
    model = network(kind, seed)
    chosen = options(beam_size=16, hypotheses=hypotheses, length_penalty=length_penalty)
    found = ours(model, chosen)
    assert_same(found, decode(convert(model), sources(), chosen))
    early = [sentence.age < LONGEST and sentence.finished < 16 for sentence in found.sentences]
    assert any(early) or length_penalty, "no sentence ended before that"


@each_network
def test_forced_scoring(kind: str, seed: int) -> None:
    model = network(kind, seed)
    generator = np.random.default_rng(seed)
    targets = [[*generator.integers(4, VOCABULARY, length).tolist(), END] for length in (0, 7, 3, 11, 1, 5)]
    penalties = [0.0, 0.5, 1.0, 1.5, 2.0, 0.6]
    found = score(TorchStepModel(model), sources(), targets, penalties)
    for one, values, penalty in zip(found, log_probabilities(convert(model), targets), penalties, strict=True):
        assert_near(one.log_probabilities, values, "log-probability")
        assert_near(one.score, sum(values) / len(values) ** penalty, "score")


@pytest.mark.parametrize("beam_size", [1, 4])
@each_network
def test_attention_and_what_it_covers(kind: str, seed: int, beam_size: int) -> None:
    """They have no coverage penalty, so it is computed from their attention, by Wu et al. (2016), section 7."""
    model = network(kind, seed)
    peer = convert(model)
    chosen = options(beam_size=beam_size, hypotheses=beam_size, coverage_penalty=0.4, length_penalty=0.8)
    penalties = []
    for source, best in zip(sources(), ours(model, chosen, attention=ALL_FAMILIES).best, strict=True):
        assert [one.score for one in best] == sorted((one.score for one in best), reverse=True)
        for one in best:
            attention = cross_attention(peer, source, one.tokens)
            assert_near(one.cross_attention, attention, "attention")
            penalties.append(sum(math.log(min(1.0, weight)) for weight in attention.mean((0, 1)).sum(0).tolist()))
            (values,) = log_probabilities(peer, [one.tokens], [source])
            assert_near(one.score, sum(values) / len(values) ** 0.8 + 0.4 * penalties[-1], "score")
    assert min(penalties) < -0.1, "everything was covered"


def log_probabilities(
    peer: Any, targets: Sequence[Sequence[int]], read: Sequence[Sequence[int]] = ()
) -> list[list[float]]:
    """Of each token of a target, given those before it; `sources` are read by default."""
    found = logits(peer, read or sources(), targets).log_softmax(-1)
    return [found[row, range(len(target)), target].tolist() for row, target in enumerate(targets)]
