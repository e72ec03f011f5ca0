import re
import sys

import pytest
import sacrebleu

from model.errors import MissingExtraError
from model.metrics import LOWER_IS_BETTER, error_rates, group_references, score_answers, text_scores
from model.pairs import Pair

ANSWERS = ["The cat sat on the mat.", "A light shines, doesn't it?", "Nothing like it"]
REFERENCES = ["The cat is on the mat.", "A lime light shines, does it not?", "Quite another sentence"]


def test_a_source_counts_once_with_all_its_references() -> None:
    pairs = [Pair("read", "R EH D"), Pair("a", "AH"), Pair("read", "R IY D"), Pair("a", "EY")]
    grouped = group_references(pairs)
    assert list(grouped.items()) == [("read", ["R EH D", "R IY D"]), ("a", ["AH", "EY"])]


@pytest.mark.parametrize(
    ("answers", "references", "wer", "per"),
    [
        (["K AE T"], [["K AE T"]], 0, 0),
        ([" K  AE T "], [["K AE T"]], 0, 0),
        (["K AE"], [["K AE T"]], 100, 100 / 3),
        (["K AE T S"], [["K AE T"]], 100, 100 / 3),
        (["K T AE"], [["K AE T"]], 100, 200 / 3),
        ([""], [["K AE T"]], 100, 100),
        (["A B C D"], [["X"]], 100, 400),
        (["KAE T"], [["K AE T"]], 100, 200 / 3),
        (["R IY D"], [["R EH D", "R IY D"]], 0, 0),
        (["R IY D", "K AE"], [["R EH D", "R IY D"], ["K AE T"]], 50, 100 / 6),
        (["A B"], [["A B C", "A X Y Z"]], 100, 100 / 3),
        (["A B C D"], [["A B", "A B C D E F G H I"]], 100, 500 / 9),
        (["A X"], [["A B", "A X C D"]], 100, 50),
    ],
    ids=[
        "right",
        "white space",
        "deletion",
        "insertion",
        "swap",
        "empty",
        "too long",
        "tokens, not characters",
        "second reference",
        "over all words",
        "nearest reference",
        "nearest for its length",
        "fewest edits of equals",
    ],
)
def test_error_rates_by_hand(answers: list[str], references: list[list[str]], wer: float, per: float) -> None:
    assert error_rates(answers, references) == pytest.approx({"wer": wer, "per": per})


@pytest.mark.parametrize("tokenize", ["13a", "char", "none"])
def test_bleu_and_chrf_are_those_of_sacrebleu(tokenize: str) -> None:
    scores = text_scores(ANSWERS, REFERENCES, tokenize)
    bleu = sacrebleu.BLEU(tokenize=tokenize, force=True).corpus_score(ANSWERS, [REFERENCES]).score
    chrf = sacrebleu.CHRF().corpus_score(ANSWERS, [REFERENCES]).score
    assert scores == {"bleu": bleu, "chrf": chrf}
    assert 5 < bleu < 95
    assert 5 < chrf < 95


def test_bleu_tokenises_as_wmt_does_by_default() -> None:
    assert text_scores(ANSWERS, REFERENCES) == text_scores(ANSWERS, REFERENCES, "13a")
    assert text_scores(ANSWERS, REFERENCES)["bleu"] != text_scores(ANSWERS, REFERENCES, "none")["bleu"]


def test_a_perfect_answer_scores_100() -> None:
    assert text_scores(REFERENCES, REFERENCES) == pytest.approx({"bleu": 100, "chrf": 100})


def test_each_task_has_its_metrics() -> None:
    references = [[reference, "never looked at"] for reference in REFERENCES]
    assert score_answers("text", ANSWERS, references) == text_scores(ANSWERS, REFERENCES)
    assert score_answers("g2p", ["K AE", "T"], [["K AE T"], ["D", "T"]]) == pytest.approx({"wer": 50, "per": 25})
    assert {name for task in ("text", "g2p") for name in score_answers(task, ["a"], [["a"]])} | {"loss"} == set(
        LOWER_IS_BETTER
    )


@pytest.mark.parametrize(
    ("task", "module", "package", "purpose"),
    [
        ("text", "sacrebleu", "sacrebleu", "scoring text"),
        ("g2p", "rapidfuzz.distance", "rapidfuzz", "scoring phonemes"),
    ],
)
def test_says_which_extra_brings_the_scorer(
    monkeypatch: pytest.MonkeyPatch, task: str, module: str, package: str, purpose: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    message = f"{purpose} needs the package '{package}', which is not installed: pip install 'limelight[evaluate]'"
    with pytest.raises(MissingExtraError, match=re.escape(message)):
        score_answers(task, ["a"], [["a"]])
