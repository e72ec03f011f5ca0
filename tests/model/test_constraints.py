"""What an answer may not contain: the search against plain loops, and against every answer there is."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InvalidRequestError
from model.forced import score
from model.options import SearchOptions
from model.search import Decoding, search
from model.steps import ALL_FAMILIES, pad
from model.vocabulary import BEGIN, END
from tests.model.searching import (
    REPEATABLE,
    SOURCES,
    alone,
    assert_same,
    beam_search_in_loops,
    options,
    steps,
)
from tests.model.steps import Prefix, SeedModel

SEEDS = range(8)


def repeats(tokens: Prefix, size: int) -> bool:
    """Some run of so many tokens occurs twice."""
    runs = [tokens[start : start + size] for start in range(len(tokens) - size + 1)]
    return len(set(runs)) < len(runs)


def may_follow(tokens: Prefix, token: int, chosen: SearchOptions) -> bool:
    """What the options' own descriptions say."""
    if len(tokens) < len(chosen.prefix):
        return token == chosen.prefix[len(tokens)]
    if token == END:
        return len(tokens) + 1 >= chosen.shortest
    size = chosen.no_repeat_ngram
    run_again = size > 0 and len(tokens) >= size - 1 and (*tokens, token)[-size:] in runs(tokens, size)
    return token not in chosen.suppressed and not run_again


def runs(tokens: Prefix, size: int) -> set[Prefix]:
    return {tokens[start : start + size] for start in range(len(tokens) - size + 1)}


def found_by_loops(model: SeedModel, source: list[int], chosen: SearchOptions) -> list[Prefix]:
    return beam_search_in_loops(model, source, chosen, lambda tokens, token: may_follow(tokens, token, chosen))


def chains(model: SeedModel, source: list[int], chosen: SearchOptions) -> list[Prefix]:
    return [tuple(one.tokens) for one in alone(model, source, chosen)]


CONSTRAINED: dict[str, dict[str, object]] = {
    "shortest": {"shortest": 4},
    "longest alone": {"shortest": 6},
    "prefix": {"prefix": (9, 4)},
    "prefix to the limit": {"prefix": (5, 5, 5, 5, 5)},
    "no token twice": {"no_repeat_ngram": 1},
    "no pair twice": {"no_repeat_ngram": 2},
    "no triple twice": {"no_repeat_ngram": 3},
    "suppressed": {"suppressed": frozenset({4, 7})},
    "suppressed that stand for no text": {"suppressed": frozenset({0, 1})},
    "all of them": {"shortest": 5, "prefix": (8, 8), "no_repeat_ngram": 2, "suppressed": frozenset({4})},
}


@pytest.mark.parametrize("what", CONSTRAINED)
@pytest.mark.parametrize("beam_size", [1, 2, 5, 16])
def test_constrained_beams_are_what_the_loops_find(what: str, beam_size: int) -> None:
    for seed, source in itertools.product(SEEDS, SOURCES):
        model = SeedModel(6, seed, end=seed % 4 - 2, unwritable=1.0)
        chosen = options(**CONSTRAINED[what], beam_size=beam_size, hypotheses=beam_size)
        assert chains(model, source, chosen) == found_by_loops(model, source, chosen), seed


SMALL: dict[str, tuple[int, dict[str, object]]] = {
    "shortest": (2, {"shortest": 3}),
    "prefix": (3, {"prefix": (5,)}),
    "longer prefix": (4, {"prefix": (6, 4)}),
    "no token twice": (3, {"no_repeat_ngram": 1, "shortest": 2}),
    "no pair twice": (2, {"no_repeat_ngram": 2}),
    "suppressed": (4, {"suppressed": frozenset({5, 7})}),
}
"""Words and constraints that leave few enough answers for a beam to hold them all."""


@pytest.mark.parametrize("what", SMALL)
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
def test_a_beam_that_holds_everything_finds_the_best_that_is_allowed(what: str, length_penalty: float) -> None:
    words, choices = SMALL[what]
    chosen = options(**choices, longest=4, beam_size=16, hypotheses=3, length_penalty=length_penalty)
    for seed in SEEDS:
        model = SeedModel(words, seed)
        scored = {
            tuple(tokens): sum(model.forced(SOURCES[0], tokens)) / len(tokens) ** length_penalty
            for tokens in model.answers(4)
            if all(may_follow(tuple(tokens[:index]), token, chosen) for index, token in enumerate(tokens))
        }
        assert chains(model, SOURCES[0], chosen) == sorted(scored, key=lambda tokens: -scored[tokens])[:3], seed


@given(
    seed=st.integers(0, 1000),
    words=st.integers(2, 9),
    end=st.floats(-4, 2),
    beam_size=st.sampled_from([1, 2, 3, 6, 16]),
    longest=st.integers(1, 12),
    data=st.data(),
)
@REPEATABLE
def test_any_constraints_together_are_what_the_loops_find(
    seed: int, words: int, end: float, beam_size: int, longest: int, data: st.DataObject
) -> None:
    model = SeedModel(words, seed, end, unwritable=data.draw(st.sampled_from([-9.0, 3.0])))
    token = st.sampled_from(model.words)
    chosen = options(
        longest=longest,
        shortest=data.draw(st.integers(1, longest)),
        beam_size=beam_size,
        hypotheses=data.draw(st.integers(1, beam_size)),
        length_penalty=data.draw(st.sampled_from([0.0, 0.5, 1.0, 3.0])),
        prefix=tuple(data.draw(st.lists(token, max_size=min(3, longest - 1)))),
        no_repeat_ngram=data.draw(st.integers(0, 3)),
        suppressed=frozenset(data.draw(st.lists(token, max_size=3))),
    )
    expected = found_by_loops(model, SOURCES[0], chosen)
    if expected:
        assert chains(model, SOURCES[0], chosen) == expected
    else:
        with pytest.raises(InvalidRequestError, match=r"^search: after \d+ tokens"):
            alone(model, SOURCES[0], chosen)


@pytest.mark.parametrize("shortest", [1, 2, 5, 6])
@pytest.mark.parametrize("beam_size", [1, 4])
def test_no_answer_is_shorter_than_asked(beam_size: int, shortest: int) -> None:
    lengths = set()
    for seed in SEEDS:
        chosen = options(shortest=shortest, beam_size=beam_size, hypotheses=beam_size)
        lengths |= {len(one.tokens) for one in alone(SeedModel(7, seed, end=8), SOURCES[0], chosen)}
    assert min(lengths) == shortest


@pytest.mark.parametrize("beam_size", [1, 4])
def test_a_prefix_begins_every_answer_with_its_own_log_probabilities(beam_size: int) -> None:
    for seed, prefix in itertools.product(SEEDS, [(4,), (9, 9), (5, 6, 7, 8)]):
        model = SeedModel(7, seed)
        found = alone(model, SOURCES[2], options(prefix=prefix, beam_size=beam_size, hypotheses=beam_size))
        assert_same(found, score(model, [SOURCES[2]] * beam_size, [one.tokens for one in found]))
        assert len({tuple(one.tokens) for one in found}) == beam_size
        for one in found:
            assert tuple(one.tokens[: len(prefix)]) == prefix
            assert one.log_probabilities == model.forced(SOURCES[2], one.tokens)
            assert one.score == pytest.approx(sum(one.log_probabilities) / len(one.tokens))


def test_a_prefix_that_the_model_finds_unlikely_is_read_all_the_same() -> None:
    model = SeedModel(7)
    worst = list(model.next_log_probabilities(tuple(SOURCES[0]), (BEGIN,)))[-3]
    (one,) = alone(model, SOURCES[0], options(prefix=(worst,)))
    assert one.tokens[0] == worst
    assert one.cross_attention is not None
    assert one.decoder_attention is not None
    assert one.decoder_attention[0, 0, 1, :2].tolist() == [BEGIN, worst]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("beam_size", [1, 4])
def test_no_run_occurs_twice(beam_size: int, size: int) -> None:
    repeated = 0
    for seed in SEEDS:
        chosen = options(longest=14, beam_size=beam_size, hypotheses=beam_size)
        kept = options(longest=14, beam_size=beam_size, hypotheses=beam_size, no_repeat_ngram=size)
        model = SeedModel(16, seed, end=-3)
        repeated += sum(repeats(tokens, size) for tokens in chains(model, SOURCES[0], chosen))
        assert not any(repeats(tokens, size) for tokens in chains(model, SOURCES[0], kept))
    assert repeated or size == 3


@pytest.mark.parametrize("beam_size", [1, 3])
def test_what_is_suppressed_never_appears(beam_size: int) -> None:
    for seed in SEEDS:
        model = SeedModel(7, seed, end=-2)
        free = set(itertools.chain(*chains(model, SOURCES[0], options(beam_size=beam_size)))) - {END}
        kept = chains(model, SOURCES[0], options(beam_size=beam_size, suppressed=frozenset(free)))
        assert free
        assert not free & set(itertools.chain(*kept))


RULED_OUT: dict[str, tuple[int, dict[str, object], int]] = {
    "greedy": (1, {"suppressed": frozenset({4, 5, 6}), "shortest": 2}, 0),
    "beam": (3, {"suppressed": frozenset({4, 5, 6}), "shortest": 2}, 0),
    "greedy, after a while": (1, {"no_repeat_ngram": 1, "shortest": 5}, 3),
    "beam, after a while": (3, {"no_repeat_ngram": 1, "shortest": 5}, 3),
    "after a prefix": (3, {"prefix": (4, 5, 6), "no_repeat_ngram": 1, "shortest": 6}, 3),
}


@pytest.mark.parametrize("what", RULED_OUT)
def test_a_sentence_without_a_token_left_fails_alone(what: str) -> None:
    beam_size, choices, after = RULED_OUT[what]
    model = SeedModel(3, end=-1)
    free, hopeless = options(longest=9, beam_size=beam_size), options(longest=9, beam_size=beam_size, **choices)
    running = Decoding(model, beam_size)
    joined = running.join(
        model.encode(*pad(SOURCES)), range(5), [free, hopeless, free, hopeless, free], [ALL_FAMILIES] * 5
    )
    for _ in steps(running):
        assert running.settled(joined[1])[after:] == []
    message = f"search: after {after} tokens every other one is ruled out: suppress fewer, or allow repeats"
    for index, sentence in enumerate(joined):
        if index % 2:
            with pytest.raises(InvalidRequestError, match=f"^{re.escape(message)}$") as caught:
                sentence.results()
            assert caught.value.field == "search"
        else:
            assert_same(sentence.results(), alone(SeedModel(3, end=-1), SOURCES[index], free))


@pytest.mark.parametrize("beam_size", [2, 4])
def test_what_was_finished_counts_where_nothing_else_is_allowed(beam_size: int) -> None:
    chosen = options(beam_size=beam_size, suppressed=frozenset({4, 5, 6}))
    (one,) = alone(SeedModel(3), SOURCES[0], chosen)
    assert (one.tokens, one.finish_reason) == ([END], "stop")


def test_constrained_sentences_and_free_ones_share_a_batch() -> None:
    chosen = [options(), *(options(**choices) for choices in CONSTRAINED.values())]
    sources = [SOURCES[index % 5] for index in range(len(chosen))]
    together = search(SeedModel(7, end=-1), sources, chosen)
    for source, own, found in zip(sources, chosen, together, strict=True):
        assert_same(found, alone(SeedModel(7, end=-1), source, own))
