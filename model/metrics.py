"""Scores of decoded outputs: word and phoneme error rate, BLEU and chrF. Torch-free.

Sources that stand in a data set several times, with several right answers, count once, with all of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from model.errors import MissingExtraError
from model.pairs import Pair

LOWER_IS_BETTER = {"loss": True, "wer": True, "per": True, "bleu": False, "chrf": False}
"""Which way each metric points."""


def group_references(pairs: Sequence[Pair]) -> dict[str, list[str]]:
    """Each distinct source with all its references, in order of first appearance."""
    references: dict[str, list[str]] = {}
    for pair in pairs:
        references.setdefault(pair.source, []).append(pair.target)
    return references


def error_rates(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Word and phoneme error rate, in percent.

    A word is right if its phonemes equal any reference. The phoneme error rate is the edit distance to the nearest
    reference (relative to its length), summed over words and divided by the length of those references, as in the
    published CMUdict results.

    Args:
        answers: space-separated phonemes, one string a word.
        references: for each word, its right answers.
    """
    distance = _edit_distance()
    wrong = errors = phonemes = 0
    for answer, right in zip(answers, references, strict=True):
        given = answer.split()
        candidates = [(distance(given, reference.split()), len(reference.split())) for reference in right]
        edits, length = min(candidates, key=lambda candidate: (candidate[0] / candidate[1], candidate[0]))
        wrong += edits > 0
        errors += edits
        phonemes += length
    return {"wer": 100 * wrong / len(answers), "per": 100 * errors / phonemes}


def text_scores(answers: Sequence[str], references: Sequence[str], tokenize: str = "13a") -> dict[str, float]:
    """BLEU and chrF by sacrebleu, 0 to 100.

    Args:
        answers: one string a sentence.
        references: the one reference of each.
        tokenize: sacrebleu's tokenizer for BLEU; "none" for text that is tokenised already.
    """
    try:
        import sacrebleu
    except ModuleNotFoundError:
        raise MissingExtraError("sacrebleu", "evaluate", "scoring text") from None
    right = [list(references)]
    bleu = sacrebleu.corpus_bleu(list(answers), right, tokenize=tokenize, force=tokenize == "none")
    return {"bleu": bleu.score, "chrf": sacrebleu.corpus_chrf(list(answers), right).score}


def score_answers(task: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> Mapping[str, float]:
    """The metrics of a task: "g2p" or "text"."""
    if task == "g2p":
        return error_rates(answers, references)
    return text_scores(answers, [right[0] for right in references])


def _edit_distance() -> Any:
    try:
        from rapidfuzz.distance import Levenshtein
    except ModuleNotFoundError:
        raise MissingExtraError("rapidfuzz", "evaluate", "scoring phonemes") from None
    return Levenshtein.distance
