"""Decode a set of pairs with any step model, and score the answers. Torch-free, so that a bundle is scored likewise."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from model.errors import DataError
from model.metrics import group_references, score_answers
from model.pairs import Pair
from model.search import SearchOptions, search
from model.steps import NO_FAMILIES, StepModel
from model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        metrics: wer and per, or bleu and chrf, in percent.
        sources: the distinct sources (g2p) or all of them in order (text).
        answers: the best hypothesis of each.
        tokens: ids of each answer.
        too_long: sources over the model's limit; they count as answered with nothing.
    """

    metrics: Mapping[str, float]
    sources: list[str]
    answers: list[str]
    tokens: list[list[int]]
    too_long: int


@dataclass(frozen=True)
class Decoder:
    """A step model with its tokenizers and limits: text in, text out."""

    model: StepModel
    source: Tokenizer
    target: Tokenizer
    longest_source: int
    longest_target: int

    def generate(
        self,
        texts: Sequence[str],
        beam_size: int = 1,
        length_penalty: float = 1.0,
        batch_tokens: int = 4000,
        progress: Callable[[int], None] = lambda count: None,
    ) -> list[list[int] | None]:
        """Token ids of the best answer to each text; None for a text that is over the limit.

        Args:
            texts: sources.
            beam_size: 1 for greedy search.
            length_penalty: see `SearchOptions`.
            batch_tokens: most padded source tokens, times beams, decoded together.
            progress: told of each batch's number of texts when it is done.
        """
        encoded = self.source.encode_ids(texts)
        order = sorted(
            (index for index, ids in enumerate(encoded) if len(ids) <= self.longest_source),
            key=lambda index: len(encoded[index]),
        )
        options = SearchOptions(longest=self.longest_target, beam_size=beam_size, length_penalty=length_penalty)
        generated: list[list[int] | None] = [None] * len(texts)
        while order:
            # Sorted by length: the last of a batch is its longest.
            count = 1
            while count < len(order) and (count + 1) * beam_size * len(encoded[order[count]]) <= batch_tokens:
                count += 1
            batch, order = order[:count], order[count:]
            found = search(self.model, [encoded[index] for index in batch], [options] * len(batch), NO_FAMILIES)
            for index, hypotheses in zip(batch, found, strict=True):
                generated[index] = hypotheses[0].tokens
            progress(len(batch))
        return generated

    def answers(
        self,
        texts: Sequence[str],
        beam_size: int = 1,
        length_penalty: float = 1.0,
        batch_tokens: int = 4000,
        progress: Callable[[int], None] = lambda count: None,
    ) -> tuple[list[str], int]:
        """As `generate`, in text: the answers, and how many texts were over the limit (their answer is empty)."""
        generated = self.generate(texts, beam_size, length_penalty, batch_tokens, progress)
        return [self.target.decode(tokens or []) for tokens in generated], generated.count(None)


def evaluate(
    decoder: Decoder,
    task: str,
    pairs: Sequence[Pair],
    beam_size: int = 1,
    length_penalty: float = 1.0,
    progress: Callable[[int], None] = lambda count: None,
    others: Sequence[Pair] = (),
) -> Evaluation:
    """Score a decoder on pairs.

    Args:
        decoder: from a checkpoint (PyTorch) or a bundle (ONNX Runtime).
        task: "g2p" groups pairs by source (any reference counts) and gives wer and per; "text" takes pairs one by one
            and gives bleu and chrf.
        pairs: the test set.
        beam_size: 1 for greedy search.
        length_penalty: see `SearchOptions`.
        progress: told of each batch's number of sources when it is done.
        others: further right answers to the same sources, see `Pairs.others`; g2p counts them.

    Raises:
        DataError: there are no pairs.
    """
    if not pairs:
        raise DataError("nothing to evaluate: no pairs")
    if task == "g2p":
        grouped = group_references(pairs)
        for other in others:
            if other.source in grouped:
                grouped[other.source].append(other.target)
        sources, references = list(grouped), list(grouped.values())
    else:
        sources, references = [pair.source for pair in pairs], [[pair.target] for pair in pairs]
    generated = decoder.generate(sources, beam_size, length_penalty, progress=progress)
    answers = [decoder.target.decode(tokens or []) for tokens in generated]
    metrics = score_answers(task, answers, references)
    return Evaluation(metrics, sources, answers, [tokens or [] for tokens in generated], generated.count(None))
