import itertools
import math

import numpy as np
import pytest

from model.errors import InvalidRequestError
from model.forced import score
from model.search import Decoding, Node, Sentence, search
from model.steps import ALL_FAMILIES, Array, Family, pad
from model.vocabulary import BEGIN, END
from tests.model.searching import FAMILIES, SOURCES, alone, assert_same, beam_search_in_loops, options, steps
from tests.model.steps import RowModel, SeedModel

SEEDS = range(12)


def decoding(model: SeedModel, count: int, **choices: object) -> Decoding:
    """The first sources under way."""
    running = Decoding(model, int(str(choices.get("beam_size", 1))))
    running.join(model.encode(*pad(SOURCES[:count])), range(count), [options(**choices)] * count)
    return running


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
            assert one.cross_attention is not None
            assert one.decoder_attention is not None
            assert one.cross_attention.shape == (1, 2, count, len(source))
            assert one.decoder_attention.shape == (1, 1, count, count)
            for row in range(count):
                read = (BEGIN, *one.tokens[:row])
                np.testing.assert_array_equal(one.cross_attention[:, :, row], model.cross(source, read))
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
    running = Decoding(model, beam_size)
    chosen = [options(longest=longest, beam_size=beam_size) for longest in (1, 5, 2, 5, 3)]
    joined = running.join(model.encode(*pad(SOURCES)), range(5), chosen)
    advanced = []
    while running.sentences:
        assert running.rows == len(running.sentences) * beam_size
        advanced.append({joined.index(sentence) for sentence in running.step()})
    assert advanced == [{0, 1, 2, 3, 4}, {1, 2, 3, 4}, {1, 3, 4}, {1, 3}, {1, 3}]
    assert model.widths == [5, 4, 3, 2, 2]


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("cancelled", [(0,), (2,), (4,), (1, 2), (0, 1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_cancelled_sentence_leaves_the_others_alone(beam_size: int, cancelled: tuple[int, ...], after: int) -> None:
    chosen = options(longest=7, beam_size=beam_size, hypotheses=beam_size)
    expected = search(SeedModel(6, seed=2, end=-2), SOURCES, [chosen] * len(SOURCES))
    model = SeedModel(6, seed=2, end=-2)
    running = Decoding(model, beam_size)
    joined = running.join(model.encode(*pad(SOURCES)), range(5), [chosen] * 5, [ALL_FAMILIES] * 5)
    for _ in range(after):
        running.step()
    gone = [joined[index] for index in cancelled]
    running.leave([sentence for sentence in gone if not sentence.done])
    while running.sentences:
        assert not set(running.step()) & set(gone)
    for index in set(range(len(SOURCES))) - set(cancelled):
        assert_same(joined[index].results(), expected[index])
    assert all(sentence.done for sentence in joined)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_what_a_cancelled_sentence_had_settled_stays(beam_size: int) -> None:
    running = decoding(SeedModel(6, end=-50), 2, beam_size=beam_size)
    fresh, started = running.sentences
    running.leave([fresh])
    assert running.settled(fresh) == []
    for _ in range(4):
        running.step()
    before = list(running.settled(started))
    running.leave([started])
    assert (running.settled(started), running.sentences, running.rows) == (before, [], 0)
    running.leave([])


@pytest.mark.parametrize("beam_size", [1, 2, 4])
@pytest.mark.parametrize("hypotheses", [1, 2])
def test_what_is_settled_stays_and_begins_the_best(beam_size: int, hypotheses: int) -> None:
    early = 0
    for seed in range(40):
        running = decoding(
            SeedModel(4, seed, end=-1.5), 5, longest=9, beam_size=beam_size, hypotheses=min(hypotheses, beam_size)
        )
        settled: dict[Sentence, list[list[int]]] = {sentence: [] for sentence in running.sentences}
        while running.sentences:
            for sentence in running.step():
                settled[sentence].append([node.token for node in running.settled(sentence)])
        for sentence, history in settled.items():
            best = sentence.results()[0].tokens
            assert history[-1] == best
            assert all(best[: len(tokens)] == tokens for tokens in history)
            assert [len(tokens) for tokens in history] == sorted(len(tokens) for tokens in history)
            early += sum(map(bool, history[:-1]))
    assert early > 100


@pytest.mark.parametrize("attention", FAMILIES, ids=sorted)
@pytest.mark.parametrize("beam_size", [1, 3])
def test_what_is_settled_carries_its_attention(beam_size: int, attention: frozenset[Family]) -> None:
    for seed in SEEDS:
        model, chosen = SeedModel(4, seed, end=-1.5), options(longest=9, beam_size=beam_size)
        running = Decoding(model, beam_size)
        joined = running.join(model.encode(*pad(SOURCES)), range(5), [chosen] * 5, [attention] * 5)
        streamed: list[list[Node]] = [[] for _ in joined]
        while running.sentences:
            running.step()
            for index, sentence in enumerate(joined):
                streamed[index] = list(running.settled(sentence))
        for sentence, nodes in zip(joined, streamed, strict=True):
            best = sentence.results()[0]
            assert [(node.token, node.log_probability) for node in nodes] == list(
                zip(best.tokens, best.log_probabilities, strict=True)
            )
            for t, node in enumerate(nodes):
                assert_row(
                    node.cross_attention, None if best.cross_attention is None else best.cross_attention[:, :, t]
                )
                own = best.decoder_attention
                assert_row(node.decoder_attention, None if own is None else own[:, :, t, : t + 1])


def assert_row(actual: Array | None, expected: Array | None) -> None:
    assert (actual is None) == (expected is None)
    if actual is not None:
        np.testing.assert_array_equal(actual, expected)


def test_a_beam_stays_full_when_the_end_is_likely() -> None:
    for seed, beam_size in itertools.product(SEEDS, (2, 3)):
        model = SeedModel(7, seed, end=3)
        running = decoding(model, 1, beam_size=beam_size)
        running.step()
        if running.sentences:
            running.step()
            rows = {prefix for _, prefix in model.known if len(prefix) == 2}
            assert len(rows) == beam_size


def test_greedy_search_settles_every_token_at_once() -> None:
    running = decoding(SeedModel(6, end=-50), 1)
    (sentence,) = running.sentences
    counts = [len(running.settled(sentence)) for _ in steps(running)]
    assert counts == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("beam_size", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("unwritable", [-math.inf, 2.0])
def test_a_beam_is_what_the_loops_find(beam_size: int, unwritable: float) -> None:
    for seed, source in itertools.product(SEEDS, SOURCES):
        model = SeedModel(1 + seed % 7, seed, end=seed % 5 - 3, unwritable=unwritable)
        penalty = (0.0, 0.6, 1.0, 4.0)[seed % 4]
        chosen = options(beam_size=beam_size, hypotheses=1 + seed % beam_size, length_penalty=penalty)
        found = [tuple(one.tokens) for one in alone(model, source, chosen)]
        assert found == beam_search_in_loops(model, source, chosen), seed


def test_a_hypothesis_at_the_limit_counts_even_when_the_beam_is_full_of_ends() -> None:
    cut = 0
    for seed in range(60):
        found = alone(SeedModel(5, seed, end=1), SOURCES[0], options(longest=4, beam_size=5, hypotheses=5))
        ended = [one for one in found if one.finish_reason == "stop"]
        cut += len(found) > len(ended) and found[0].finish_reason == "length"
    assert cut > 0


@pytest.mark.parametrize("model", [SeedModel(6, end=-1), RowModel(6, end=-1)], ids=["past", "row"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.5])
def test_every_hypothesis_is_what_forced_decoding_says_of_it(model: SeedModel, length_penalty: float) -> None:
    chosen = options(beam_size=4, hypotheses=4, length_penalty=length_penalty)
    for source, found in zip(SOURCES, search(model, SOURCES, [chosen] * 5), strict=True):
        targets = [one.tokens for one in found]
        assert_same(found, score(model, [source] * 4, targets, [length_penalty] * 4))


def test_beams_of_different_sizes_do_not_share_a_batch() -> None:
    model = SeedModel(3)
    memory = model.encode(*pad(SOURCES[:2]))
    with pytest.raises(ValueError, match="sentences of other beam sizes than 2 cannot share this batch"):
        Decoding(model, 2).join(memory, [0, 1], [options(beam_size=2), options(beam_size=3)])


def test_sequences_are_padded_on_the_right() -> None:
    ids, mask = pad([[5, 6, 7], [], [8]], value=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 9], [8, 9, 9]]
    assert mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]


@pytest.mark.parametrize("choices", [{"prefix": (4, 9)}, {"suppressed": frozenset({4, 9})}], ids=str)
def test_an_id_that_the_model_does_not_have_is_refused_before_anyone_joins(choices: dict[str, object]) -> None:
    model = SeedModel(5)
    running = decoding(model, 2)
    memory, (field,) = model.encode(*pad(SOURCES[2:4])), choices
    with pytest.raises(InvalidRequestError, match=rf"^{field}: 9 is not from 0 to 8 \(ids of the vocabulary\)$"):
        running.join(memory, range(2), [options(), options(**choices)])
    joined = list(running.sentences)
    assert len(joined) == 2
    for _ in steps(running):
        pass
    for sentence, source in zip(joined, SOURCES, strict=False):
        assert_same(sentence.results(), alone(model, source, options(), frozenset()))
