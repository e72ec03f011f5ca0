"""The lexicon of a shortlist: Model 1 as it is worked out by hand, and what stands beside what in real pairs."""

import numpy as np
import pytest

import export.lexicon
from export.lexicon import Encoded, evenly, learn_lexicon, lexicon_of, translation_probabilities
from model.config import TokenizersConfig
from model.errors import DataError
from model.pairs import Pair
from model.tokenizer import train_tokenizers
from tests.reversal import LETTERS, pairs, parts

DAS, HAUS, BUCH, EIN = range(4)
THE, HOUSE, BOOK, A = range(4)
BOOKS: list[Encoded] = [([DAS, HAUS], [THE, HOUSE]), ([DAS, BUCH], [THE, BOOK]), ([EIN, BUCH], [A, BOOK])]
"""The example that textbooks work out (Koehn 2010, figure 4.4)."""

BY_HAND = {
    1: {(DAS, THE): 1 / 2, (DAS, HOUSE): 1 / 4, (DAS, BOOK): 1 / 4, (HAUS, THE): 1 / 2, (BUCH, BOOK): 1 / 2},
    2: {(DAS, THE): 7 / 11, (DAS, HOUSE): 2 / 11, (HAUS, THE): 3 / 7, (HAUS, HOUSE): 4 / 7, (BUCH, A): 2 / 11},
}
"""p(target | source) after so many rounds. In the second, "the" of the first pair is shared out by halves, that of the
second pair 2 to 1, and "house" 1 to 2: "das" is expected with "the" 1/2 + 2/3 times, of 1/2 + 2/3 + 1/3 + 1/3."""


@pytest.mark.parametrize("chunk", [1, 1000])
@pytest.mark.parametrize("iterations", BY_HAND)
def test_it_is_what_one_works_out_by_hand(iterations: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.lexicon, "CHUNK", chunk)
    keys, probabilities = translation_probabilities(BOOKS, 4, iterations)
    found = {(int(key) // 4, int(key) % 4): value for key, value in zip(keys, probabilities, strict=True)}
    assert len(found) == 10
    for pair, expected in BY_HAND[iterations].items():
        assert found[pair] == pytest.approx(expected), pair


def test_a_repeated_token_counts_as_often_as_it_stands_there() -> None:
    _, probabilities = translation_probabilities([([0, 0, 1], [0]), ([1], [1])], 2, 1)
    assert probabilities.tolist() == pytest.approx([1, 0.25, 0.75])


def test_the_best_come_first_and_what_never_stood_there_is_nothing() -> None:
    lexicon = lexicon_of([*BOOKS, ([], [A, A]), ([5], [])], 7, 4, 2)
    assert lexicon.ids.tolist() == [[THE, HOUSE], [HOUSE, THE], [BOOK, A], [A, BOOK], [0, 0], [0, 0], [0, 0]]
    assert (lexicon.probabilities[:4, 0] > lexicon.probabilities[:4, 1]).all()
    assert not lexicon.probabilities[4:].any()
    assert lexicon.frequencies.tolist() == [2 / 8, 1 / 8, 2 / 8, 3 / 8]
    assert lexicon.most_frequent(3).tolist() == [A, THE, BOOK]


def test_letters_are_found_in_their_reversal() -> None:
    given = pairs(parts()["train"][:400])
    source, target = train_tokenizers(TokenizersConfig(), [one.source for one in given], [one.target for one in given])
    lexicon = learn_lexicon(given, source, target, 3)
    for letter in LETTERS:
        (found, _), (expected, _) = source.encode(letter), target.encode(letter)
        assert lexicon.ids[found.id, 0] == expected.id
        assert lexicon.probabilities[found.id, 0] > 2 * lexicon.probabilities[found.id, 1]
    assert not lexicon.probabilities[:4].any()  # nothing brings about a special token, nor they anything
    assert not lexicon.frequencies[:4].any()


def test_of_many_pairs_some_are_taken_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert evenly(range(10), 4) == [0, 2, 5, 7]
    assert evenly(range(3), 4) == range(3)
    monkeypatch.setattr(export.lexicon, "MOST_LINKS", 8)
    assert lexicon_of(BOOKS, 4, 4).frequencies.tolist() == [1 / 2, 1 / 4, 1 / 4, 0]


def test_without_pairs_there_is_none() -> None:
    source, target = train_tokenizers(TokenizersConfig(), ["a"], ["b"])
    with pytest.raises(DataError, match=r"^a shortlist is learnt from training pairs, and there are none: name some"):
        learn_lexicon(list[Pair](), source, target)


def test_probabilities_of_a_source_sum_to_one() -> None:
    random = np.random.default_rng(0)
    some = [(random.integers(0, 9, 6).tolist(), random.integers(0, 7, 4).tolist()) for _ in range(50)]
    keys, probabilities = translation_probabilities(some, 7)
    np.testing.assert_allclose(np.bincount(keys // 7, probabilities), 1)
