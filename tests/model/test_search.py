import itertools
import math
import re
from collections.abc import Sequence

import numpy as np
import pytest

from model.errors import InvalidRequestError
from model.search import LARGEST_BEAM, Decoding, Hypothesis, SearchOptions, search
from model.steps import pad
from model.tokenizer import BEGIN, END
from tests.model.steps import SeedModel, cross_row

SOURCES = [[5, 6, 7, END], [8, END], [9, 4, 4, 4, 6, END], [END], [6, 5, END]]
SEEDS = range(12)


def options(**choices: float) -> SearchOptions:
    return SearchOptions(**{"longest": 6, **choices})  # type: ignore[arg-type]


def alone(model: SeedModel, source: Sequence[int], chosen: SearchOptions) -> list[Hypothesis]:
    return search(model, [source], [chosen])[0]


def assert_same(actual: Sequence[Hypothesis], expected: Sequence[Hypothesis]) -> None:
    assert [one.tokens for one in actual] == [one.tokens for one in expected]
    for one, other in zip(actual, expected, strict=True):
        assert (one.score, one.log_probabilities, one.finish_reason) == (
            other.score,
            other.log_probabilities,
            other.finish_reason,
        )
        np.testing.assert_array_equal(one.cross_attention, other.cross_attention)
        np.testing.assert_array_equal(one.decoder_attention, other.decoder_attention)


@pytest.mark.parametrize(("words", "longest"), [(2, 4), (3, 3), (15, 2), (4, 1), (1, 8)])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.5, 10.0])
def test_a_beam_that_holds_everything_finds_the_best_of_all(words: int, longest: int, length_penalty: float) -> None:
    for seed in SEEDS:
        model = SeedModel(words, seed)
        scored = {
            tuple(tokens): sum(model.forced(SOURCES[0], tokens)) / len(tokens) ** length_penalty
            for tokens in model.answers(longest)
        }
        count = min(3, len(scored))
        chosen = options(longest=longest, beam_size=16, hypotheses=count, length_penalty=length_penalty)
        best = sorted(scored.items(), key=lambda item: -item[1])[:count]
        found = alone(model, SOURCES[0], chosen)
        assert [tuple(one.tokens) for one in found] == [tokens for tokens, _ in best], seed
        assert [one.score for one in found] == pytest.approx([score for _, score in best])


@pytest.mark.parametrize("source", SOURCES, ids=str)
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_greedy_search_takes_the_likeliest_token_each_time(source: list[int], length_penalty: float) -> None:
    model = SeedModel(9, seed=3)
    tokens: list[int] = []
    while len(tokens) < 20 and END not in tokens:
        following = model.next_log_probabilities(tuple(source), (BEGIN, *tokens))
        tokens.append(max(following, key=lambda token: following[token]))
    found = alone(model, source, options(longest=20, length_penalty=length_penalty))
    assert [one.tokens for one in found] == [tokens]


@pytest.mark.parametrize("beam_size", [2, 3, 5, 16])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
def test_the_n_best_are_distinct_and_best_first(beam_size: int, length_penalty: float) -> None:
    for seed, source in itertools.product(SEEDS, SOURCES):
        model = SeedModel(7, seed)
        found = alone(model, source, options(beam_size=beam_size, hypotheses=beam_size, length_penalty=length_penalty))
        scores = [one.score for one in found]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(one.tokens) for one in found}) == len(found) == beam_size
        for one in found:
            assert one.log_probabilities == model.forced(source, one.tokens)
            assert one.log_probability == pytest.approx(sum(one.log_probabilities))
            assert one.score == pytest.approx(one.log_probability / len(one.tokens) ** length_penalty)
            assert END not in one.tokens[:-1]


@pytest.mark.parametrize(("end", "length", "reason"), [(-50.0, 6, "length"), (50.0, 1, "stop")])
@pytest.mark.parametrize("beam_size", [1, 4])
def test_a_search_ends_by_itself_or_at_the_limit(beam_size: int, end: float, length: int, reason: str) -> None:
    best = alone(SeedModel(7, end=end), SOURCES[0], options(beam_size=beam_size))[0]
    assert (len(best.tokens), best.finish_reason) == (length, reason)
    assert (best.tokens[-1] == END) == (reason == "stop")


@pytest.mark.parametrize("longest", [1, 2, 7])
def test_an_end_at_the_limit_is_an_end(longest: int) -> None:
    reasons = set()
    for seed in SEEDS:
        for one in alone(SeedModel(2, seed, end=-1), SOURCES[0], options(longest=longest, beam_size=4, hypotheses=4)):
            assert len(one.tokens) <= longest
            assert one.finish_reason == ("stop" if one.tokens[-1] == END else "length")
            assert one.finish_reason == "stop" or len(one.tokens) == longest
            reasons.add(one.finish_reason)
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("beam_size", [1, 2, 5])
def test_attention_follows_the_hypothesis(beam_size: int) -> None:
    model = SeedModel(7, seed=1, end=-1)
    chosen = options(longest=8, beam_size=beam_size, hypotheses=beam_size)
    for source, found in zip(SOURCES, search(model, SOURCES, [chosen] * len(SOURCES)), strict=True):
        for one in found:
            count = len(one.tokens)
            assert one.cross_attention.shape == (1, 2, count, len(source))
            assert one.decoder_attention.shape == (1, 1, count, count)
            for row in range(count):
                read = (BEGIN, *one.tokens[:row])
                np.testing.assert_array_equal(
                    one.cross_attention[:, :, row], cross_row(np.array(source), read)[:, :, 0]
                )
                assert one.decoder_attention[0, 0, row].tolist() == [*read, *[0] * (count - row - 1)]


@pytest.mark.parametrize("beam_size", [1, 2, 4])
def test_a_sentence_is_decoded_in_a_batch_as_alone(beam_size: int) -> None:
    for seed in SEEDS:
        model = SeedModel(6, seed)
        chosen = [
            options(longest=2 + 2 * index, beam_size=beam_size, hypotheses=1 + index % beam_size, length_penalty=index)
            for index in range(len(SOURCES))
        ]
        together = search(model, SOURCES, chosen)
        for source, own, found in zip(SOURCES, chosen, together, strict=True):
            assert_same(found, alone(SeedModel(6, seed), source, own))


@pytest.mark.parametrize("beam_size", [1, 3])
def test_finished_sentences_leave_the_batch(beam_size: int) -> None:
    model = SeedModel(6, end=-50)
    limits = [1, 5, 2, 5, 3]
    decoding = Decoding(model, SOURCES, [options(longest=longest, beam_size=beam_size) for longest in limits])
    steps = []
    while not decoding.done:
        steps.append(decoding.step())
    assert steps == [[0, 1, 2, 3, 4], [1, 2, 3, 4], [1, 3, 4], [1, 3], [1, 3]]
    assert model.widths == [5, 4, 3, 2, 2]


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("cancelled", [(0,), (2,), (4,), (1, 2), (0, 1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_cancelled_sentence_leaves_the_others_alone(beam_size: int, cancelled: tuple[int, ...], after: int) -> None:
    chosen = [options(longest=7, beam_size=beam_size, hypotheses=beam_size)] * len(SOURCES)
    expected = search(SeedModel(6, seed=2, end=-2), SOURCES, chosen)
    decoding = Decoding(SeedModel(6, seed=2, end=-2), SOURCES, chosen)
    for _ in range(after):
        decoding.step()
    for index in (*cancelled, *cancelled):
        decoding.cancel(index)
    while not decoding.done:
        assert not set(decoding.step()) & set(cancelled)
    for index in set(range(len(SOURCES))) - set(cancelled):
        assert_same(decoding.results(index), expected[index])
    assert all(search.done for search in decoding.searches)


@pytest.mark.parametrize("beam_size", [1, 2, 4])
@pytest.mark.parametrize("hypotheses", [1, 2])
def test_what_is_settled_stays_and_begins_the_best(beam_size: int, hypotheses: int) -> None:
    early = 0
    for seed in range(40):
        chosen = [options(longest=9, beam_size=beam_size, hypotheses=min(hypotheses, beam_size))] * len(SOURCES)
        decoding = Decoding(SeedModel(4, seed, end=-1.5), SOURCES, chosen)
        settled: list[list[list[int]]] = [[] for _ in SOURCES]
        while not decoding.done:
            for index in decoding.step():
                settled[index].append([node.token for node in decoding.searches[index].settled()])
        for index, history in enumerate(settled):
            best = decoding.results(index)[0].tokens
            assert history[-1] == best
            assert all(best[: len(tokens)] == tokens for tokens in history)
            assert [len(tokens) for tokens in history] == sorted(len(tokens) for tokens in history)
            early += sum(map(bool, history[:-1]))
    assert early > 100


def test_a_beam_stays_full_when_the_end_is_likely() -> None:
    for seed, beam_size in itertools.product(SEEDS, (2, 3)):
        decoding = Decoding(SeedModel(7, seed, end=3), SOURCES[:1], [options(beam_size=beam_size)])
        decoding.step()
        assert decoding.done or len(decoding.searches[0].tokens) == beam_size


def test_greedy_search_settles_every_token_at_once() -> None:
    decoding = Decoding(SeedModel(6, end=-50), SOURCES[:1], [options()])
    counts = []
    while not decoding.done:
        decoding.step()
        counts.append(len(decoding.searches[0].settled()))
    assert counts == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("choices", "field", "message"),
    [
        ({"beam_size": 0}, "beam_size", "beam_size: 0 is not from 1 to 16"),
        ({"beam_size": LARGEST_BEAM + 1}, "beam_size", "beam_size: 17 is not from 1 to 16"),
        ({"hypotheses": 0}, "hypotheses", "hypotheses: 0 is not from 1 to 1 (beam_size)"),
        ({"beam_size": 2, "hypotheses": 3}, "hypotheses", "hypotheses: 3 is not from 1 to 2 (beam_size)"),
        ({"length_penalty": math.nan}, "length_penalty", "length_penalty: nan is not from 0.0 to 10.0"),
        ({"length_penalty": -0.1}, "length_penalty", "length_penalty: -0.1 is not from 0.0 to 10.0"),
        ({"length_penalty": math.inf}, "length_penalty", "length_penalty: inf is not from 0.0 to 10.0"),
        ({"longest": 0}, "longest", "longest: 0 is not at least 1"),
        ({"longest": -3}, "longest", "longest: -3 is not at least 1"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(choices: dict[str, float], field: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{re.escape(message)}$") as caught:
        options(**choices)
    assert caught.value.field == field


def test_beams_of_different_sizes_do_not_share_a_batch() -> None:
    with pytest.raises(ValueError, match="sentences of different beam sizes cannot share a batch"):
        Decoding(SeedModel(3), SOURCES[:2], [options(beam_size=2), options(beam_size=3)])


def test_sequences_are_padded_on_the_right() -> None:
    ids, mask = pad([[5, 6, 7], [], [8]], value=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 9], [8, 9, 9]]
    assert mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
