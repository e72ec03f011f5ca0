"""Which words are translations of which, read off cross-attention in forced decoding. Torch-free.

    source tokens          source words
    ┌───────────┐          ┌───────┐
    │ attention │  merged  │       │  in each row the greatest:
    │ per token │ ───────▶ │       │  one link for each target word
    └───────────┘          └───────┘
    target tokens          target words

Rows of attention belong to steps of the decoder, each of which reads one token and predicts the next. Naively a word
has the steps that predict its tokens. A step knows better where a word came from that it has read than where one comes
from that it has yet to predict: so, shifted, a word has the steps whose input its tokens are (Chen et al. 2020,
Accurate Word Alignment Induction from Neural Machine Translation).
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from model.errors import DataError
from model.evaluate import Decoder
from model.forced import score
from model.pairs import Pair, read_lines
from model.steps import Family
from model.tokenizer import Token

Unit = Literal["words", "tokens"]
"""What is aligned with what."""

CROSS: frozenset[Family] = frozenset({"cross"})

_WORD = re.compile(r"\S+")
_LINK = re.compile(r"(\d+)([-p?])(\d+)")


class Link(NamedTuple):
    """A word of the source and one of the target, counted from 0."""

    source: int
    target: int


class Gold(NamedTuple):
    """Links of one pair that people made."""

    sure: frozenset[Link]
    """Those that all agree on."""
    possible: frozenset[Link]
    """Those that are not wrong, the sure ones among them."""


@dataclass(frozen=True)
class Heads:
    """Which attention is read.

    Attributes:
        layers: of the decoder, from 0.
        heads: of each of these layers, from 0; their mean is taken.
    """

    layers: tuple[int, ...]
    heads: tuple[int, ...]


def word_attention(
    decoder: Decoder,
    pairs: Sequence[Pair],
    *,
    units: Unit = "words",
    shift: bool = False,
    batch_tokens: int = 4000,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Float[np.ndarray, "layer head target source"]]:
    """Cross-attention between the words of given pairs, of every layer and head.

    Words are what white space separates. A word's columns are summed, so that it has all the attention its tokens have;
    its rows are averaged, so that each row is still a distribution. A token that reaches over several words belongs to
    the first. What looks at the end token belongs to no word and is left out: rows sum to at most 1.

    Args:
        decoder: of the model.
        pairs: source and target texts.
        units: what is aligned: words, or each token by itself (letters with phonemes, say).
        shift: a word has the steps that read it, not those that predict it.
        batch_tokens: most padded tokens, of source and target together, that are read at once.
        progress: told of each batch's number of pairs when it is done.

    Raises:
        DataError: a text has nothing to align, or more tokens than the model takes.
    """
    read = [_read(decoder, number, pair, units) for number, pair in enumerate(pairs, 1)]
    order = sorted(range(len(read)), key=lambda index: read[index].tokens)
    found: list[Float[np.ndarray, "layer head target source"]] = [np.empty((0, 0, 0, 0))] * len(pairs)
    while order:
        count = 1
        while count < len(order) and (count + 1) * read[order[count]].tokens <= batch_tokens:
            count += 1
        batch, order = order[:count], order[count:]
        scored = score(
            decoder.model,
            [[token.id for token in read[index].source] for index in batch],
            [[token.id for token in read[index].target] for index in batch],
            attention=CROSS,
        )
        for index, hypothesis in zip(batch, scored, strict=True):
            if hypothesis.cross_attention is None:
                raise DataError("the model returns no cross-attention: nothing can be aligned with it")
            found[index] = read[index].merged(hypothesis.cross_attention, shift=shift)
        progress(len(batch))
    return found


def read_off(attention: Float[np.ndarray, "layer head target source"], chosen: Heads) -> frozenset[Link]:
    """The link of each target word: to the source word that it looks at most; of equals, the first.

    A target word that looks at nothing but the end token has no link.
    """
    weights = attention[list(chosen.layers)][:, list(chosen.heads)].mean((0, 1))
    return frozenset(Link(int(best), row) for row, best in enumerate(weights.argmax(-1)) if weights[row, best] > 0.0)


def error_rate(found: Sequence[frozenset[Link]], gold: Sequence[Gold]) -> float:
    """Alignment error rate in percent (Och and Ney 2003): 1 - (|A and S| + |A and P|) / (|A| + |S|), over all pairs.

    Raises:
        DataError: neither has any link.
    """
    agreed = sum(
        len(links & right.sure) + len(links & right.possible) for links, right in zip(found, gold, strict=True)
    )
    there = sum(len(links) + len(right.sure) for links, right in zip(found, gold, strict=True))
    if not there:
        raise DataError("no links at all: there is nothing to compare")
    return 100 * (1 - agreed / there)


def choose(attention: Sequence[Float[np.ndarray, "layer head target source"]], gold: Sequence[Gold]) -> Heads:
    """The heads of one layer that align best together, on pairs that are not those it is tested on.

    In each layer the best head is taken, and others are added for as long as one makes it better; of equals, the fewest
    and first.
    """

    def rate(layer: int, heads: Sequence[int]) -> float:
        return error_rate([read_off(one, Heads((layer,), tuple(heads))) for one in attention], gold)

    layers, heads = attention[0].shape[:2]
    best: tuple[float, Heads] | None = None
    for layer in range(layers):
        chosen, lowest = list[int](), np.inf
        while left := [head for head in range(heads) if head not in chosen]:
            least, head = min((rate(layer, [*chosen, head]), head) for head in left)
            if least >= lowest:
                break
            chosen, lowest = [*chosen, head], least
        if best is None or lowest < best[0]:
            best = float(lowest), Heads((layer,), tuple(sorted(chosen)))
    assert best is not None  # a model has a layer
    return best[1]


def pharaoh(links: Iterable[Link]) -> str:
    """As `0-0 1-2`, source first, in the order of the target."""
    return " ".join(
        f"{link.source}-{link.target}" for link in sorted(links, key=lambda link: (link.target, link.source))
    )


def read_gold(path: Path, *, first: int = 0, reverse: bool = False) -> list[Gold]:
    """Links of a file, one line a pair: `i-j` is sure, `ipj` or `i?j` possible.

    Args:
        path: of the file, plain or gzip.
        first: number of the first word, 0 or 1.
        reverse: the target's word comes first in each link.

    Raises:
        DataError: a line holds something else, or a number below the first.
    """
    return [_gold(line, f"{path}, line {number}", first, reverse) for number, line in enumerate(read_lines(path), 1)]


def _gold(line: str, where: str, first: int, reverse: bool) -> Gold:
    sure, possible = set[Link](), set[Link]()
    for written in line.split():
        match = _LINK.fullmatch(written)
        if match is None:
            raise DataError(f"{where}: {written!r} is no link: i-j is a sure one, ipj or i?j a possible one")
        one, other = int(match[1]) - first, int(match[3]) - first
        if min(one, other) < 0:
            raise DataError(f"{where}: {written!r} has a word before the first, which is {first}")
        link = Link(other, one) if reverse else Link(one, other)
        possible.add(link)
        if match[2] == "-":
            sure.add(link)
    return Gold(frozenset(sure), frozenset(possible))


class _Read(NamedTuple):
    """A pair's tokens, and the number of the word that each belongs to."""

    source: list[Token]
    target: list[Token]
    columns: list[int | None]
    rows: list[int | None]
    words: tuple[int, int]
    """How many the target has, and the source."""

    @property
    def tokens(self) -> int:
        return len(self.source) + len(self.target)

    def merged(
        self, attention: Float[np.ndarray, "layer head row column"], *, shift: bool
    ) -> Float[np.ndarray, "layer head target source"]:
        # The step that reads a token is the one after that which predicts it; the last token's predicts the end.
        steps = attention[:, :, int(shift) :][:, :, : len(self.rows) - 1]
        rows = _membership(self.rows[:-1], self.words[0])
        rows /= np.maximum(rows.sum(0), 1)
        merged: Float[np.ndarray, "layer head target source"] = (
            rows.T @ steps.astype(np.float64) @ _membership(self.columns, self.words[1])
        )
        return merged


def _membership(words: Sequence[int | None], count: int) -> Float[np.ndarray, "token word"]:
    """1 where a token belongs to a word."""
    found = np.zeros((len(words), count))
    for token, word in enumerate(words):
        if word is not None:
            found[token, word] = 1.0
    return found


def _read(decoder: Decoder, number: int, pair: Pair, units: Unit) -> _Read:
    sides = []
    limits = {"source": decoder.longest_source, "target": decoder.longest_target}
    for (side, limit), text, tokenizer in zip(limits.items(), pair, (decoder.source, decoder.target), strict=True):
        tokens = tokenizer.encode(text)
        belongs = _words_of(tokens, text) if units == "words" else _each(tokens)
        if not any(word is not None for word in belongs):
            raise DataError(f"pair {number}: the {side} has no {units}")
        if len(tokens) > limit:
            raise DataError(f"pair {number}: the {side} has {len(tokens)} tokens, the model takes {limit}")
        sides.append((tokens, belongs, len(_WORD.findall(text)) if units == "words" else len(tokens) - 1))
    (source, columns, wide), (target, rows, high) = sides
    return _Read(source, target, columns, rows, (high, wide))


def _words_of(tokens: Sequence[Token], text: str) -> list[int | None]:
    """The first word of which each token has a character; None of one that has none, or only spaces."""
    words = [match.span() for match in _WORD.finditer(text)]
    return [
        next((word for word, (start, end) in enumerate(words) if token.start < end and start < token.end), None)
        for token in tokens
    ]


def _each(tokens: Sequence[Token]) -> list[int | None]:
    """Every token but the end is by itself."""
    return [*range(len(tokens) - 1), None]
