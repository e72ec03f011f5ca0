"""Words aligned by attention: how tokens become words, which steps are theirs, and the error rate."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.align import Gold, Heads, Link, choose, error_rate, pharaoh, read_gold, read_off, word_attention
from model.errors import DataError
from model.evaluate import Decoder
from model.hypotheses import Hypothesis
from model.pairs import Pair
from model.tokenizer import Tokenizer
from tests.model.steps import SeedModel
from tests.model.texts import trained

LETTERS = trained("characters", ["abcde fgh"])
RNG = np.random.default_rng(3)
PAIR = Pair("ab cde", "fg h")
"""Tokens: a b space c d e end; f g space h end."""
CROSS = RNG.random((2, 3, 5, 7))
"""layer, head, step of the decoder, source token."""


def decoder(source: Tokenizer = LETTERS, target: Tokenizer = LETTERS, longest: int = 20) -> Decoder:
    return Decoder(SeedModel(5), source, target, longest, longest)


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forced decoding returns CROSS, cut to the pair."""

    def score(_: object, sources: list[list[int]], targets: list[list[int]], **__: object) -> list[Hypothesis]:
        blank = Hypothesis(tokens=[], log_probabilities=[], score=0.0, finish_reason="stop")
        return [
            replace(blank, cross_attention=CROSS[:, :, : len(target), : len(source)])
            for source, target in zip(sources, targets, strict=True)
        ]

    monkeypatch.setattr("model.align.score", score)


@pytest.mark.usefixtures("attended")
@pytest.mark.parametrize("shift", [False, True])
def test_columns_of_a_word_are_summed_and_rows_averaged(shift: bool) -> None:
    (found,) = word_attention(decoder(), [PAIR], shift=shift)
    steps = CROSS[:, :, 1:] if shift else CROSS
    sources = np.stack([steps[..., 0:2].sum(-1), steps[..., 3:6].sum(-1)], -1)
    expected = np.stack([sources[:, :, 0:2].mean(2), sources[:, :, 3]], 2)
    np.testing.assert_allclose(found, expected)


@pytest.mark.usefixtures("attended")
@pytest.mark.parametrize("shift", [False, True])
def test_tokens_by_themselves_have_all_but_the_end(shift: bool) -> None:
    (found,) = word_attention(decoder(), [PAIR], units="tokens", shift=shift)
    np.testing.assert_allclose(found, CROSS[:, :, shift : 4 + shift, :6])


@pytest.mark.usefixtures("attended")
def test_pairs_stay_in_order_whatever_is_read_together() -> None:
    pairs = [PAIR, Pair("a", "b"), Pair("ab", "c d"), Pair("c d", "e")]
    counts: list[int] = []
    found = word_attention(decoder(), pairs, batch_tokens=8, progress=counts.append)
    assert [one.shape[2:] for one in found] == [(2, 2), (1, 1), (2, 1), (1, 2)]
    assert sum(counts) == len(pairs)
    assert len(counts) > 1


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (Pair("ab", " "), "pair 2: the target has no words"),
        (Pair("", "ab"), "pair 2: the source has no words"),
        (Pair("a" * 20, "b"), "pair 2: the source has 21 tokens, the model takes 20"),
    ],
)
def test_what_cannot_be_aligned_is_told(pair: Pair, message: str) -> None:
    with pytest.raises(DataError, match=f"^{message}$"):
        word_attention(decoder(), [Pair("a", "b"), pair])


def test_each_target_word_is_linked_to_what_it_looks_at_most() -> None:
    attention = np.zeros((2, 2, 3, 3))
    attention[1, 0] = [[0.1, 0.7, 0.2], [0.4, 0.4, 0.2], [0.0, 0.0, 0.0]]
    attention[1, 1] = [[0.9, 0.0, 0.0], [0.0, 0.0, 0.9], [0.0, 0.0, 0.0]]
    assert read_off(attention, Heads((1,), (0,))) == {Link(1, 0), Link(0, 1)}
    assert read_off(attention, Heads((1,), (0, 1))) == {Link(0, 0), Link(2, 1)}
    assert read_off(attention, Heads((0,), (0, 1))) == frozenset()


def gold(sure: set[Link], *more: Link) -> Gold:
    return Gold(frozenset(sure), frozenset(sure | set(more)))


def test_the_error_rate_is_that_of_och_and_ney() -> None:
    right = [gold({Link(0, 0), Link(1, 1)}, Link(2, 1)), gold({Link(0, 1)})]
    found = [frozenset({Link(0, 0), Link(2, 1)}), frozenset({Link(1, 1)})]
    # |A| 3, |S| 3, |A and S| 1, |A and P| 2
    assert error_rate(found, right) == pytest.approx(100 * (1 - (1 + 2) / (3 + 3)))
    assert error_rate([one.sure for one in right], right) == 0
    assert error_rate([frozenset(), frozenset()], right) == 100
    with pytest.raises(DataError, match="no links at all"):
        error_rate([frozenset()], [gold(set())])


def test_the_best_heads_of_one_layer_are_chosen() -> None:
    right = gold({Link(0, 0), Link(1, 1), Link(2, 2)})
    attention = np.full((2, 3, 3, 3), 0.1)
    attention[0, :, :, 0] = 1.0  # one right of three
    attention[1, 0] = [[1, 0, 0], [0, 0, 1], [0, 0, 1]]  # two right
    attention[1, 2] = [[0, 0.1, 0], [0, 3, 0], [0, 0.1, 0]]  # one right, and what the first lacks
    assert choose([attention], [right]) == Heads((1,), (0, 2))
    assert error_rate([read_off(attention, Heads((1,), (0, 2)))], [right]) == 0


def test_links_are_written_in_the_order_of_the_target() -> None:
    assert pharaoh([Link(2, 1), Link(0, 1), Link(5, 0)]) == "5-0 0-1 2-1"


def test_right_links_are_read(tmp_path: Path) -> None:
    path = tmp_path / "gold"
    path.write_text("1-2 3p1\n\n2?2 \n", encoding="utf-8")
    assert read_gold(path, first=1) == [gold({Link(0, 1)}, Link(2, 0)), gold(set()), gold(set(), Link(1, 1))]
    assert read_gold(path, first=1, reverse=True)[0] == gold({Link(1, 0)}, Link(0, 2))
    assert read_gold(path)[0] == gold({Link(1, 2)}, Link(3, 1))


@pytest.mark.parametrize(
    ("line", "message"),
    [("0-1", "line 2: '0-1' has a word before the first, which is 1"), ("1:2", "line 2: '1:2' is no link")],
)
def test_what_is_no_link_is_refused(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "gold"
    path.write_text(f"1-1\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_gold(path, first=1)
