"""Encoded pairs in batches of a token budget, bucketed by length, in an order that seed and epoch alone decide."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from model.config import ModelConfig
from model.errors import DataError
from model.pairs import Pair
from model.steps import pad
from model.tokenizer import Tokenizer
from model.vocabulary import BEGIN, PAD


class Batch(NamedTuple):
    """Some pairs, padded on the right."""

    source_ids: Int[Tensor, "batch source"]
    source_mask: Bool[Tensor, "batch source"]
    target_ids: Int[Tensor, "batch target"]
    """What the decoder reads: begin token and target without its end."""
    next_ids: Int[Tensor, "batch target"]
    """What it is to predict: the target with its end token; padding where there is nothing to predict."""

    @property
    def target_tokens(self) -> int:
        """Tokens to predict, padding left out."""
        return int((self.next_ids != PAD).sum())

    def to(self, device: torch.device) -> Self:
        """The batch on another device."""
        return type(self)(*(tensor.to(device, non_blocking=True) for tensor in self))


class Example(NamedTuple):
    """Token ids of a pair, an end token last on both sides."""

    source: list[int]
    target: list[int]


@dataclass(frozen=True)
class Examples:
    """The encoded pairs of one part of a data set.

    Attributes:
        examples: those within the limits.
        too_long: pairs left out because a side was over its limit.
    """

    examples: list[Example]
    too_long: int


def encode_pairs(
    pairs: Sequence[Pair], source: Tokenizer, target: Tokenizer, limits: ModelConfig, what: str
) -> Examples:
    """Encode pairs, leaving out (and counting) those longer than the model takes.

    Raises:
        DataError: none is left.
    """
    sources = source.encode_ids([pair.source for pair in pairs])
    targets = target.encode_ids([pair.target for pair in pairs])
    examples = [
        Example(*sides)
        for sides in zip(sources, targets, strict=True)
        if len(sides[0]) <= limits.longest_source and len(sides[1]) <= limits.longest_target
    ]
    if not examples:
        raise DataError(
            f"{what}: no pairs are left; all {len(pairs)} are longer than longest_source={limits.longest_source} or "
            f"longest_target={limits.longest_target} tokens"
        )
    return Examples(examples, len(pairs) - len(examples))


def collate(examples: Sequence[Example]) -> Batch:
    """Pad examples into one batch."""
    source_ids, source_mask = pad([example.source for example in examples])
    target_ids, _ = pad([[BEGIN, *example.target[:-1]] for example in examples])
    next_ids, _ = pad([example.target for example in examples])
    return Batch(*map(torch.from_numpy, (source_ids, source_mask, target_ids, next_ids)))


def bucket(examples: Sequence[Example], tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """One epoch's batches: indices of examples of similar length, at most `tokens` padded tokens on either side.

    A pair longer than the whole budget makes a batch of its own. Examples of equal lengths are shuffled among
    themselves and the batches as a whole, by seed and epoch alone, so that a resumed run sees the same batches.
    """
    shuffle = random.Random(f"{seed}/{epoch}")
    order = list(range(len(examples)))
    shuffle.shuffle(order)
    order.sort(key=lambda index: (len(examples[index].target), len(examples[index].source)))
    batches: list[list[int]] = []
    widest = 0
    for index in order:
        widest = max(widest, *map(len, examples[index]))
        if not batches or widest * (len(batches[-1]) + 1) > tokens:
            batches.append([])
            widest = max(map(len, examples[index]))
        batches[-1].append(index)
    shuffle.shuffle(batches)
    return batches


@dataclass
class BatchStream:
    """An endless stream of batches that can be put back to any place in it.

    Attributes:
        epoch: epochs completed.
        place: batches taken of the current one.
    """

    examples: Sequence[Example]
    tokens: int
    seed: int
    rank: int = 0
    world: int = 1
    epoch: int = 0
    place: int = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batches = bucket(self.examples, self.tokens, self.seed, self.epoch)
            while self.place < len(batches):
                indices = batches[self.place]
                self.place += 1
                yield self._share([self.examples[index] for index in indices])
            self.epoch, self.place = self.epoch + 1, 0

    def _share(self, examples: list[Example]) -> Batch:
        # Every process takes its part of each batch. One that would get nothing reads a pair without learning from it,
        # so that all of them take part in every exchange of gradients.
        mine = examples[self.rank :: self.world]
        if mine:
            return collate(mine)
        batch = collate(examples[:1])
        return batch._replace(next_ids=torch.full_like(batch.next_ids, PAD))
