import re

import pytest

from model.errors import DataError
from model.evaluate import Decoder, evaluate
from model.metrics import text_scores
from model.pairs import Pair
from tests.model.steps import SeedModel
from tests.model.texts import trained

SOURCE, TARGET = trained("characters", ["abcdefgh"]), trained("symbols", ["A B C D E"])
TEXTS = ["abc", "a", "hgfedcba", "bb", "abc", "", "cab"]


def decoder(model: SeedModel | None = None, longest_source: int = 20) -> Decoder:
    return Decoder(model or SeedModel(5, seed=4, end=-1), SOURCE, TARGET, longest_source, longest_target=6)


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("batch_tokens", [1, 9, 30, 4000])
def test_answers_are_in_the_order_of_the_texts(beam_size: int, batch_tokens: int) -> None:
    answers, too_long = decoder().answers(TEXTS, beam_size, batch_tokens=batch_tokens)
    alone = [decoder().answers([text], beam_size)[0][0] for text in TEXTS]
    assert (answers, too_long) == (alone, 0)
    assert len(set(answers)) > 4


def test_beams_share_the_budget_of_a_batch() -> None:
    narrow, wide = SeedModel(5, end=-50), SeedModel(5, end=-50)
    decoder(narrow).answers(["abc"] * 24, beam_size=1, batch_tokens=48)
    decoder(wide).answers(["abc"] * 24, beam_size=4, batch_tokens=48)
    assert (set(narrow.widths), set(wide.widths)) == ({12}, {3})


def test_progress_counts_the_texts_of_each_batch() -> None:
    counts: list[int] = []
    decoder().answers(["abc"] * 5, batch_tokens=8, progress=counts.append)
    assert counts == [2, 2, 1]


def test_sources_over_the_limit_are_answered_with_nothing() -> None:
    answers, too_long = decoder(longest_source=4).answers(TEXTS)
    assert [bool(answer) for answer in answers] == [text != "hgfedcba" for text in TEXTS]
    assert too_long == 1
    assert decoder(longest_source=1).answers(["a", "b"]) == (["", ""], 2)


def test_phonemes_are_scored_by_word_with_every_reference() -> None:
    right = decoder().answers(["abc", "a"])[0]
    pairs = [Pair("abc", "X Y Z"), Pair("a", "X"), Pair("abc", right[0])]
    result = evaluate(decoder(), "g2p", pairs)
    assert (result.sources, result.answers, result.too_long) == (["abc", "a"], right, 0)
    assert result.metrics["wer"] == 50


def test_text_is_scored_pair_by_pair() -> None:
    pairs = [Pair("abc", "A B C D"), Pair("a", "B A"), Pair("abc", "C D E A")]
    result = evaluate(decoder(), "text", pairs, beam_size=2)
    assert result.sources == ["abc", "a", "abc"]
    assert result.answers == decoder().answers(result.sources, beam_size=2)[0]
    assert result.metrics == text_scores(result.answers, [pair.target for pair in pairs])


def test_the_length_penalty_reaches_the_search() -> None:
    texts = ["abc", "a", "bb", "cab", "h", "gf"]
    short, long = (
        decoder(SeedModel(5)).answers(texts, beam_size=8, length_penalty=penalty)[0] for penalty in (0.0, 10.0)
    )
    assert sum(map(len, short)) < sum(map(len, long))


def test_nothing_cannot_be_evaluated() -> None:
    with pytest.raises(DataError, match=f"^{re.escape('nothing to evaluate: no pairs')}$"):
        evaluate(decoder(), "text", [])
