"""Step models made of a seed instead of a network: every prefix has random log-probabilities of its own.

They know what a hypothesis has read only from what they are given, as a network would. Their "attention" tells where a
row has been: the decoder's is the tokens read so far, the cross-attention's first head is the source and its second a
number that only this prefix has.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import numpy as np

from model.steps import Array, GreedySteps, Kept, Memory, Question, Step, StepModel
from model.vocabulary import BEGIN, END, PAD

Prefix = tuple[int, ...]


class SeedModel:
    """Says END or one of some words, as the seed will have it. Of its past it keeps each token and its position.

    Args:
        words: how many other tokens there are, from id 4.
        seed: another seed, another language.
        end: added to the score of END before the softmax.
        unwritable: score of the padding and begin tokens, which are impossible by default.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, words: int, seed: int = 0, end: float = 0.0, unwritable: float = -math.inf) -> None:
        self.memory: Sequence[Kept] = [(1, "source"), ()]
        self.state: Sequence[Kept] = [(2, "past")]
        self.vocabulary = 4 + words
        self.words = list(range(4, 4 + words))
        self._seed, self._end, self._unwritable = seed, end, unwritable
        self.known: dict[tuple[Prefix, Prefix], dict[int, float]] = {}
        """What it was asked, and said."""
        self.widths: list[int] = []
        """Sentences in each step's batch."""
        self.shapes: list[tuple[int, int]] = []
        """Columns of the past and of the source in each step."""

    def next_log_probabilities(self, source: Prefix, prefix: Prefix) -> dict[int, float]:
        """Of each token, after the begin token and others; best first."""
        if (source, prefix) not in self.known:
            scores = np.random.default_rng([self._seed, *source, 0, *prefix]).normal(0, 1.5, 1 + len(self.words))
            scores[0] += self._end
            scores = np.append(scores, [self._unwritable] * 2)
            values = (scores - np.log(np.exp(scores).sum())).tolist()
            ranked = sorted(zip(values, [END, *self.words, PAD, BEGIN], strict=True), reverse=True)
            self.known[source, prefix] = {token: value for value, token in ranked}
        return self.known[source, prefix]

    def cross(self, source: Sequence[int], prefix: Sequence[int]) -> Array:
        """Attention of a new position: layer, head, source."""
        return np.array([[source, [stamp(prefix)] * len(source)]], np.float64)

    def encode(self, source_ids: Array, source_mask: Array, attention: bool = True) -> Memory:
        weights = np.zeros((len(source_ids), 1, 1, *source_ids.shape[1:] * 2)) if attention else None
        return Memory((source_ids[:, None], source_mask.sum(1)), source_mask, weights)

    def step(self, question: Question) -> Step:
        (ids, lengths), mask = question.memory.tensors, question.memory.source_mask
        assert mask.sum(1).tolist() == lengths.tolist(), "what is kept of a source moves with it"
        assert 1 <= question.top <= self.vocabulary
        self.widths.append(len(mask))
        self.shapes.append((question.past_visible.shape[2], mask.shape[1]))
        prefixes = self.prefixes(question)
        sources = [tuple(row[0, real].tolist()) for row, real in zip(ids, mask, strict=True)]
        found = [
            [self.next_log_probabilities(source, prefix) for prefix in row]
            for source, row in zip(sources, prefixes, strict=True)
        ]
        ranked = np.array([[self._ranked(one)[: question.top] for one in row] for row in found])
        return Step(
            top_log_probabilities=ranked[..., 0],
            top_ids=ranked[..., 1].astype(np.int64),
            next_log_probabilities=np.array(
                [
                    [one.get(wanted, -math.inf) for one, wanted in zip(row, next_ids, strict=True)]
                    for row, next_ids in zip(found, question.next_ids.tolist(), strict=True)
                ]
            ),
            cross_attention=self._cross_attention(sources, prefixes, mask) if "cross" in question.attention else None,
            decoder_attention=self.decoder_attention(question) if "decoder" in question.attention else None,
            state=self.remembered(question, prefixes),
        )

    def prefixes(self, question: Question) -> list[list[Prefix]]:
        """What each new position has read, itself last."""
        seen = np.concatenate((question.past_visible, question.new_visible), 2)
        tokens, positions = _columns(question)
        found = []
        for sentence, rows in enumerate(seen):
            found.append([_in_order(tokens[sentence, row], positions[sentence, row]) for row in rows])
            lengths = [len(prefix) for prefix in found[-1]]
            assert lengths == (question.positions[sentence] + 1).tolist(), "a row sees all that it has read"
            assert [prefix[-1] for prefix in found[-1]] == question.target_ids[sentence].tolist()
        return found

    def decoder_attention(self, question: Question) -> Array | None:
        """Tokens in the columns that a row sees."""
        seen = np.concatenate((question.past_visible, question.new_visible), 2)
        return np.where(seen, _columns(question)[0][:, None], 0.0)[:, None, None]

    def remembered(self, question: Question, prefixes: list[list[Prefix]]) -> tuple[Array, ...]:  # noqa: ARG002
        """What to keep of the new positions."""
        return (np.stack((question.target_ids, question.positions), 1).astype(np.float32),)

    def forced(self, source: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """Log-probability of each token of an answer."""
        read = (BEGIN, *tokens)
        return [
            self.next_log_probabilities(tuple(source), read[: index + 1])[token] for index, token in enumerate(tokens)
        ]

    def answers(self, longest: int) -> Iterator[list[int]]:
        """Every answer there is."""
        for length in range(longest):
            yield from ([*answer, END] for answer in product(self.words, repeat=length))
        yield from map(list, product(self.words, repeat=longest))

    def _ranked(self, log_probabilities: dict[int, float]) -> list[tuple[float, int]]:
        missing = [token for token in range(self.vocabulary) if token not in log_probabilities]
        return [(value, token) for token, value in log_probabilities.items()] + [(-math.inf, one) for one in missing]

    def _cross_attention(self, sources: list[Prefix], prefixes: list[list[Prefix]], mask: Array) -> Array:
        rows = [[self.cross(source, prefix) for prefix in row] for source, row in zip(sources, prefixes, strict=True)]
        weights = np.zeros((len(mask), *rows[0][0].shape[:2], len(prefixes[0]), mask.shape[1]))
        for sentence, row in enumerate(rows):
            weights[sentence, ..., : len(sources[sentence])] = np.stack(row, 2)
        return weights


class RowModel(SeedModel):
    """Keeps what each row has read in a fixed space of its own, as a recurrent network does; it has no self-attention.

    Args:
        words: how many other tokens there are, from id 4.
        seed: another seed, another language.
        end: added to the score of END before the softmax.
        room: most tokens that a row can read.
    """

    def __init__(self, words: int, seed: int = 0, end: float = 0.0, room: int = 64) -> None:
        super().__init__(words, seed, end)
        self.state = [("row", room), (1, "row")]

    def prefixes(self, question: Question) -> list[list[Prefix]]:
        read, counts = question.state
        found = []
        for sentence, new in enumerate(question.target_ids.tolist()):
            known = [
                tuple(row[: int(count)].astype(int).tolist())
                for row, count in zip(read[sentence], counts[sentence, 0], strict=True)
            ]
            if len(known) == len(new):
                found.append([(*before, token) for before, token in zip(known, new, strict=True)])
            else:
                found.append([(*known[0], *new[: index + 1]) for index in range(len(new))])
            lengths = [len(prefix) for prefix in found[-1]]
            assert lengths == (question.positions[sentence] + 1).tolist(), "a row goes on from its parent"
        return found

    def decoder_attention(self, question: Question) -> Array | None:  # noqa: ARG002
        return None

    def remembered(self, question: Question, prefixes: list[list[Prefix]]) -> tuple[Array, ...]:
        read, counts = np.zeros_like(question.state[0]), np.zeros_like(question.state[1])
        for sentence, row in enumerate(prefixes):
            for index, prefix in enumerate(row[-read.shape[1] :]):
                read[sentence, index, : len(prefix)] = prefix
                counts[sentence, 0, index] = len(prefix)
        return read, counts


class SeedAhead(SeedModel):
    """A seed's language, several steps at a time; remembers how many it took each time."""

    def __init__(self, words: int, seed: int = 0, end: float = 0.0) -> None:
        super().__init__(words, seed, end)
        self.taken: list[int] = []

    def greedy(self, question: Question, steps: int, fewest: int) -> GreedySteps:
        made = one_by_one(self, question, steps, fewest)
        self.taken.append(len(made.ids))
        return made


class RowAhead(SeedAhead, RowModel):
    """The same of what keeps rows."""


def one_by_one(model: StepModel, question: Question, steps: int, fewest: int) -> GreedySteps:
    """Several greedy steps, spelled out."""
    batch, before = len(question.target_ids), question.past_visible.shape[2]
    live, columns = np.ones(batch, bool), question.state
    made: list[tuple[Array, Array, Array | None, Array | None]] = []
    now = replace(question, new_visible=np.ones((batch, 1, 1), bool), next_ids=np.zeros((batch, 1), np.int64), top=3)
    while len(made) < steps and (not made or live.sum() > fewest):
        step = model.step(now)
        values = np.where(np.isin(step.top_ids, [PAD, BEGIN]), -np.inf, step.top_log_probabilities)[:, 0]
        best = values.argmax(1)[:, None]
        ids, chosen = (np.take_along_axis(array, best, 1) for array in (step.top_ids[:, 0], values))
        made.append((ids[:, 0], chosen[:, 0], step.cross_attention, step.decoder_attention))
        columns = tuple(
            np.concatenate((old, new), 1 + kept.index("past")) if "past" in kept else new
            for old, new, kept in zip(columns, step.state, model.state, strict=True)
        )
        visible = np.concatenate((now.past_visible, now.new_visible), 2)
        now = replace(now, target_ids=ids, positions=now.positions + 1, past_visible=visible, state=columns)
        live &= ids[:, 0] != END
    all_ids, all_values, cross, own = zip(*made, strict=True)
    return GreedySteps(
        ids=np.array(all_ids),
        log_probabilities=np.array(all_values),
        cross_attention=np.concatenate(cross, 3) if cross[0] is not None else None,
        decoder_attention=_padded(own, before + steps) if own[0] is not None else None,
        state=tuple(
            np.moveaxis(np.moveaxis(tensor, 1 + kept.index("past"), 0)[before:], 0, 1 + kept.index("past"))
            if "past" in kept
            else tensor
            for tensor, kept in zip(columns, model.state, strict=True)
        ),
    )


def _padded(weights: Sequence[Array], columns: int) -> Array:
    return np.concatenate([np.pad(one, [(0, 0)] * 4 + [(0, columns - one.shape[-1])]) for one in weights], 3)


def stamp(prefix: Sequence[int]) -> float:
    """A number for a prefix."""
    return zlib.crc32(bytes(prefix)) / 2**32


def _columns(question: Question) -> tuple[Array, Array]:
    """Tokens and positions in the columns of the past and of the new."""
    tokens = np.concatenate((question.state[0][:, 0], question.target_ids), 1)
    positions = np.concatenate((question.state[0][:, 1], question.positions), 1)
    return tokens.astype(np.int64), positions.astype(np.int64)


def _in_order(tokens: Array, positions: Array) -> Prefix:
    order = np.argsort(positions, kind="stable")
    assert positions[order].tolist() == list(range(len(order))), "a row sees one token at each position"
    return tuple(tokens[order].tolist())
