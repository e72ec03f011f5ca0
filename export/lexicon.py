"""Which target tokens a source token brings about: a lexicon learnt from pairs, for the candidates of a shortlist.

    pairs ── tokens ──► every source token beside every target token ── EM ──► p(target | source) ──► the best of each

It is Model 1 of Brown et al. 1993 ("The Mathematics of Statistical Machine Translation", section 4.1) without its empty
source word: what belongs to no source token is frequent, and what is frequent is a candidate anyway.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
from jaxtyping import Float, Int

from model.errors import DataError
from model.pairs import Pair
from model.steps import Array
from model.tokenizer import Tokenizer

MOST_PAIRS = 200_000
"""Pairs that are learnt from, at even distances: more change little among the best."""

MOST_LINKS = 64 * 1024 * 1024
"""Most pairs of a source and a target token over all sentences, to be kept in memory: of long sentences, fewer are
learnt from."""

CHUNK = 4 * 1024 * 1024
"""Pairs of tokens that are looked at in one go."""

ITERATIONS = 5
"""Rounds of EM: the first few decide the order of the best."""

BEST = 100
"""Target tokens kept for each source token, as in Marian's `--shortlist lexicon 100 100`."""

Encoded: TypeAlias = tuple[Sequence[int], Sequence[int]]
"""Token ids of a source and of its target, without end tokens."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Lexicon:
    """The best target tokens of each source token, and how common each target token is.

    Attributes:
        ids: target ids, best first; 0 where there are no more.
        probabilities: of each, given the source token; 0 where there are no more.
        frequencies: share of each target token among all.
    """

    ids: Int[np.ndarray, "source_vocabulary best"]
    probabilities: Float[np.ndarray, "source_vocabulary best"]
    frequencies: Float[np.ndarray, " target_vocabulary"]

    def most_frequent(self, count: int) -> Int[np.ndarray, " count"]:
        """So many target ids, the most frequent first."""
        found: Array = np.argsort(-self.frequencies, kind="stable")[:count]
        return found


def learn_lexicon(pairs: Sequence[Pair], source: Tokenizer, target: Tokenizer, best: int = BEST) -> Lexicon:
    """Learn it from pairs of text.

    Args:
        pairs: the training pairs; of more than MOST_PAIRS some at even distances.
        source: tokenizer of the sources.
        target: tokenizer of the targets.
        best: target tokens kept for each source token.

    Raises:
        DataError: there are no pairs.
    """
    if not pairs:
        raise DataError("a shortlist is learnt from training pairs, and there are none: name some with --set data...")
    chosen = evenly(pairs, MOST_PAIRS)
    encoded = [
        (ids[:-1], others[:-1])  # without end tokens: they would stand beside everything
        for ids, others in zip(
            source.encode_ids([pair.source for pair in chosen]),
            target.encode_ids([pair.target for pair in chosen]),
            strict=True,
        )
    ]
    return lexicon_of(encoded, len(source), len(target), best)


def lexicon_of(pairs: Sequence[Encoded], source_vocabulary: int, target_vocabulary: int, best: int = BEST) -> Lexicon:
    """Learn it from token ids without end tokens; as `learn_lexicon`."""
    links = sum(len(source) * len(target) for source, target in pairs)
    pairs = evenly(pairs, max(1, len(pairs) * MOST_LINKS // max(links, MOST_LINKS)))
    keys, probabilities = translation_probabilities(pairs, target_vocabulary)
    counts = np.bincount(_flat([target for _, target in pairs]), minlength=target_vocabulary)
    best = min(best, target_vocabulary)
    ids, values = _best(keys // target_vocabulary, keys % target_vocabulary, probabilities, source_vocabulary, best)
    return Lexicon(ids, values, counts / max(1, counts.sum()))


def translation_probabilities(
    pairs: Sequence[Encoded], target_vocabulary: int, iterations: int = ITERATIONS
) -> tuple[Int[np.ndarray, " entry"], Float[np.ndarray, " entry"]]:
    """Model 1 by EM, from the same probability for everything.

    Args:
        pairs: token ids.
        target_vocabulary: entries of the target vocabulary.
        iterations: rounds.

    Returns:
        source id * target_vocabulary + target id, in order, of all that ever stood beside each other; and p(target |
        source) of each.
    """
    chunks = [_links(chunk, target_vocabulary) for chunk in _chunks(pairs)]
    keys = np.unique(np.concatenate([np.zeros(0, np.int64), *(own for own, _, _ in chunks)]))
    indexed = [(np.searchsorted(keys, own).astype(np.int32)[index], lengths) for own, index, lengths in chunks]
    del chunks
    sources = keys // target_vocabulary
    probabilities = np.ones(len(keys))
    for _ in range(iterations):
        counts = np.zeros(len(keys))
        for index, lengths in indexed:
            counts += _expected(probabilities[index], index, lengths, len(keys))
        totals = np.bincount(sources, counts)
        probabilities = counts / totals[sources]
    return keys, probabilities


def _expected(
    probabilities: Float[np.ndarray, " link"],
    index: Int[np.ndarray, " link"],
    lengths: Int[np.ndarray, " target"],
    entries: int,
) -> Float[np.ndarray, " entry"]:
    """How often each entry is expected: every target token is shared out among the source tokens of its sentence."""
    starts = np.cumsum(lengths) - lengths
    shares = probabilities / np.repeat(np.add.reduceat(probabilities, starts), lengths)
    expected: Array = np.bincount(index, shares, entries)
    return expected


def _chunks(pairs: Sequence[Encoded]) -> Iterator[list[Encoded]]:
    chunk: list[Encoded] = []
    size = 0
    for source, target in pairs:
        if not source or not target:
            continue
        if chunk and size + len(source) * len(target) > CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append((source, target))
        size += len(source) * len(target)
    if chunk:
        yield chunk


def _links(
    pairs: Sequence[Encoded], target_vocabulary: int
) -> tuple[Int[np.ndarray, " entry"], Int[np.ndarray, " link"], Int[np.ndarray, " target"]]:
    """Every source token beside every target token, target by target.

    Returns:
        The distinct keys; which of them each link has; and how many source tokens stand beside each target token.
    """
    keys = [
        (np.asarray(source, np.int64)[None, :] * target_vocabulary + np.asarray(target, np.int64)[:, None]).ravel()
        for source, target in pairs
    ]
    lengths = np.repeat([len(source) for source, _ in pairs], [len(target) for _, target in pairs])
    own, index = np.unique(np.concatenate(keys), return_inverse=True)
    return own, index.astype(np.int32), lengths


def _best(
    sources: Array, targets: Array, probabilities: Array, source_vocabulary: int, best: int
) -> tuple[Array, Array]:
    """Of each source the best targets, in a table; among equals, the lower id first."""
    order = np.lexsort((targets, -probabilities, sources))
    sources, targets, probabilities = sources[order], targets[order], probabilities[order]
    ranks = np.arange(len(sources)) - np.searchsorted(sources, sources)
    kept = ranks < best
    ids = np.zeros((source_vocabulary, best), np.int32)
    values = np.zeros((source_vocabulary, best), np.float32)
    place = (sources[kept], ranks[kept])
    ids[place], values[place] = targets[kept], probabilities[kept]
    return ids, values


def evenly(items: Sequence[Item], most: int) -> Sequence[Item]:
    """At most so many, at even distances."""
    if len(items) <= most:
        return items
    return [items[index * len(items) // most] for index in range(most)]


def _flat(sequences: Sequence[Sequence[int]]) -> Int[np.ndarray, " token"]:
    found: Array = np.array([token for sequence in sequences for token in sequence], np.int64)
    return found
