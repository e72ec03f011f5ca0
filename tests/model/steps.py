"""A step model made of a seed instead of a network: every prefix has random log-probabilities of its own.

Its "attention" tells where a row has been: the decoder's is the tokens read so far, the cross-attention's first head is
the source and its second a number that only this prefix has. A column of padding comes first, as beside an older row.
"""

import zlib
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, TypeAlias

import numpy as np

from model.steps import Memory, Scores, Step
from model.tokenizer import BEGIN, END

Array: TypeAlias = np.ndarray[Any, Any]
Prefix: TypeAlias = tuple[int, ...]


class SeedModel:
    """Says END or one of some words, as the seed will have it.

    Args:
        words: how many other tokens there are, from id 4.
        seed: another seed, another language.
        end: added to the score of END before the softmax.
    """

    def __init__(self, words: int, seed: int = 0, end: float = 0.0) -> None:
        self.vocabulary = np.array([END, *range(4, 4 + words)])
        self._seed, self._end = seed, end
        self.widths: list[int] = []
        """Sentences in each step's batch."""

    def next_log_probabilities(self, source: Prefix, prefix: Prefix) -> dict[int, float]:
        """Of each token, after the begin token and others."""
        scores = np.random.default_rng([self._seed, *source, 0, *prefix]).normal(0, 1.5, len(self.vocabulary))
        scores[0] += self._end
        return dict(zip(self.vocabulary.tolist(), (scores - np.log(np.exp(scores).sum())).tolist(), strict=True))

    def encode(self, source_ids: Array, source_mask: Array) -> Memory:
        return Memory(source_ids, source_mask, np.zeros((*source_ids.shape[:1], 1, 1, *source_ids.shape[1:] * 2)))

    def select(self, memory: Memory, sentences: Array) -> Memory:
        return Memory(memory.tensors[sentences], memory.source_mask[sentences], memory.encoder_attention)

    def step(
        self, target_ids: Array, positions: Array, memory: Memory, state: Any, state_rows: Array, top: int
    ) -> Step:
        past = [()] * len(target_ids) if state is None else [state[row] for row in state_rows]
        prefixes = [(*before, int(new)) for before, (new,) in zip(past, target_ids, strict=True)]
        assert positions[:, 0].tolist() == [len(prefix) - 1 for prefix in prefixes]
        self.widths.append(len(memory.source_mask))
        sources = _sources(memory, len(prefixes))
        ranked = [_ranked(self.next_log_probabilities(*row))[:top] for row in zip(sources, prefixes, strict=True)]
        return Step(
            np.array([[[value for value, _ in row]] for row in ranked]),
            np.array([[[token for _, token in row]] for row in ranked]),
            np.stack(
                [cross_row(ids, prefix) for ids, prefix in zip(_padded(memory, len(prefixes)), prefixes, strict=True)]
            ),
            np.array([(-1, *prefix) for prefix in prefixes], np.float64)[:, None, None, None, :],
            prefixes,
        )

    def score(self, target_ids: Array, next_ids: Array, memory: Memory) -> Scores:
        raise NotImplementedError

    def forced(self, source: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """Log-probability of each token of an answer."""
        read = (BEGIN, *tokens)
        return [
            self.next_log_probabilities(tuple(source), read[: index + 1])[token] for index, token in enumerate(tokens)
        ]

    def answers(self, longest: int) -> Iterator[list[int]]:
        """Every answer there is."""
        words = self.vocabulary[1:].tolist()
        for length in range(longest):
            yield from ([*answer, END] for answer in product(words, repeat=length))
        yield from map(list, product(words, repeat=longest))


def stamp(prefix: Sequence[int]) -> float:
    """A number for a prefix."""
    return zlib.crc32(bytes(prefix)) / 2**32


def cross_row(source: Array, prefix: Sequence[int]) -> Array:
    """What `SeedModel` says of one new position: layer, head, new, source."""
    return np.stack([source.astype(np.float64), np.full(len(source), stamp(prefix))])[None, :, None, :]


def _ranked(log_probabilities: dict[int, float]) -> list[tuple[float, int]]:
    return sorted(((value, token) for token, value in log_probabilities.items()), reverse=True)


def _padded(memory: Memory, rows: int) -> Array:
    return np.repeat(memory.tensors, rows // len(memory.tensors), 0)


def _sources(memory: Memory, rows: int) -> list[Prefix]:
    masks = np.repeat(memory.source_mask, rows // len(memory.tensors), 0)
    return [tuple(ids[mask].tolist()) for ids, mask in zip(_padded(memory, rows), masks, strict=True)]
