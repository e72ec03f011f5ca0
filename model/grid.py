"""The running batch: sentences side by side, a fixed number of rows each, with all that is remembered of them.

             row 0   row 1   row 2            Sentences join at the end and leave from anywhere (the last one takes the
sentence 0   a b     a c     a d              place); the steps of the others go on. Keys and values of the past lie in
sentence 1   x       -       -                a ring of columns, written once and never moved: which row sees which
                                              column is a mask, and all that reordering hypotheses changes.

Who sees what is kept here, in numpy; the tensors are kept by a store, which may leave them on a device.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from model.steps import NO_FAMILIES, Family, GreedySteps, Memory, Question, Step, StepModel, StepsAhead
from model.store import ArrayStore, Store, larger, more_room

SMALLEST_RING = 16
"""Columns of a ring to begin with, and the unit that it grows by."""

SOURCE_UNIT = 8
"""Source lengths are rounded up to a multiple of this, so that a slightly longer one seldom moves the others."""


@runtime_checkable
class KeepsState(Protocol):
    """A step model that has its own place for the tensors of a running batch."""

    def new_store(self, width: int) -> Store:
        """An empty one, for sentences of so many rows each."""
        ...


class Grid:
    """Memory, past and visibility of the sentences being decoded.

    Args:
        model: what computes the steps; if it keeps tensors itself, it does for this grid too.
        width: rows of each sentence: hypotheses kept at a time.

    Attributes:
        count: sentences in it.
        age: for each, tokens that its rows have read.
        clock: steps taken.
        ring: columns of the past.
    """

    def __init__(self, model: StepModel, width: int) -> None:
        self._model, self.width = model, width
        self._store: Store = model.new_store(width) if isinstance(model, KeepsState) else ArrayStore(model, width)
        self.count, self.clock, self.ring = 0, 0, SMALLEST_RING
        self.age: Int[np.ndarray, " sentence"] = np.zeros(0, np.int64)
        self._lengths: Int[np.ndarray, " sentence"] = np.zeros(0, np.int64)
        self._mask = np.zeros((0, 0), bool)
        self._visible = np.zeros((0, width, self.ring, width), bool)
        self._among = np.eye(width, dtype=bool)[None]

    def join(self, memory: Memory, sentences: Sequence[int]) -> None:
        """Let sentences of an encoded batch in, at the end.

        Args:
            memory: of the batch.
            sentences: which of them.
        """
        if not sentences:
            return
        if not self.count:
            self._start(memory, sentences)
        else:
            self._append(memory, sentences)

    def leave(self, places: Sequence[int]) -> list[int]:
        """Take sentences out; the last ones move into the gaps.

        Args:
            places: of those that leave.

        Returns:
            For each place that is still taken, the place that its sentence had before.
        """
        gone, order = set(places), list(range(self.count))
        for place in sorted(gone, reverse=True):
            last = order.pop()
            if place < len(order):
                order[place] = last
        for place, before in enumerate(order):
            if place != before:
                for array in (self._mask, self._visible, self._lengths, self.age):
                    array[place] = array[before]
        self.count = len(order)
        if order and gone:
            self._store.leave(order)
            self._shrink()
        return order

    def step(
        self,
        tokens: Int[np.ndarray, "sentence row"],
        parents: Int[np.ndarray, "sentence row"],
        next_ids: Int[np.ndarray, "sentence row"],
        top: int,
        attention: frozenset[Family] = NO_FAMILIES,
    ) -> Step:
        """Let every row read a token.

        Args:
            tokens: what each row reads.
            parents: which row of the step before each goes on from.
            next_ids: tokens whose log-probabilities are wanted besides.
            top: how many candidates are wanted.
            attention: families to return. Columns of decoder attention are the ring's, `width` rows each, and then the
                new position of every row: see `columns`.
        """
        count, width = self.count, self.width
        self._have_room()
        visible = self._visible[:count]
        if width > 1:
            rows = np.arange(count)[:, None] * width + parents
            visible[:] = visible.reshape(count * width, self.ring, width).take(rows, 0)
        step = self._model.step(
            Question(
                target_ids=tokens,
                positions=self.age[:, None].repeat(width, 1),
                new_visible=self._among.repeat(count, 0),
                past_visible=visible.reshape(count, width, -1),
                next_ids=next_ids,
                top=min(top, self._model.vocabulary),
                memory=Memory(self._store.memory(), self._mask[:count]),
                state=self._store.state(parents),
                attention=attention - {"encoder"},
            )
        )
        column = self.clock % self.ring
        self._store.write(step.state, column)
        visible[:, :, column] = self._among
        self.age = self.age + 1
        self.clock += 1
        return step

    def greedy(
        self,
        model: StepsAhead,
        tokens: Int[np.ndarray, "sentence 1"],
        steps: int,
        fewest: int,
        attention: frozenset[Family] = NO_FAMILIES,
    ) -> tuple[GreedySteps, list[Int[np.ndarray, " target"]]]:
        """Let every sentence read a token and go on by itself, where each has one row.

        Args:
            model: this grid's own, which can.
            tokens: what each reads first.
            steps: most steps to take; fewer are taken where the ring comes round or is full.
            fewest: stop once no more sentences than this are without an end token.
            attention: families to return.

        Returns:
            What the model says; and for each sentence, where the decoder attention has what it has read, to the last
            of the steps.
        """
        count, oldest = self.count, int(self.age.max())
        self._have_room()
        column, seen = self.clock % self.ring, self._seen()
        visible = self._visible[:count]
        question = Question(
            target_ids=tokens,
            positions=self.age[:, None],
            new_visible=np.broadcast_to(self._among, (count, 1, 1)),
            past_visible=visible[:, :, seen, 0],
            next_ids=tokens,
            top=1,
            memory=Memory(self._store.memory(), self._mask[:count]),
            state=tuple(
                tensor[(slice(None), *(seen if size == "past" else slice(None) for size in kept))]
                for tensor, kept in zip(self._store.state(np.zeros_like(tokens)), self._model.state, strict=True)
            ),
            attention=attention - {"encoder"},
        )
        made = model.greedy(question, min(steps, self.ring - max(column, oldest)), fewest)
        taken = len(made.ids)
        columns = self._columns_of_steps(taken)
        self._store.write(made.state, column)
        visible[:, :, column : column + taken] = True
        self.age = self.age + taken
        self.clock += taken
        return made, columns

    def columns(
        self, rows: Int[np.ndarray, "sentence row time"], ages: Int[np.ndarray, " sentence"]
    ) -> Int[np.ndarray, "sentence row time+1"]:
        """Where the newest step's decoder attention has what each row has read, its new token last.

        Args:
            rows: which row of its sentence read each token before, in the line that ends in each row.
            ages: how many each sentence's rows had read; what comes after the new token is to be cut off.
        """
        count, width, longest = rows.shape
        times = self.clock - 1 - ages[:, None] + np.arange(longest + 1)
        read = np.zeros((count, width, longest + 1), np.int64)
        read[:, :, :longest] = rows
        before = np.arange(longest + 1) < ages[:, None]
        own = self.ring * width + np.arange(width)[:, None]
        columns: Int[np.ndarray, "sentence row read"] = np.where(
            before[:, None], (times % self.ring * width)[:, None] + read, own
        )
        return columns

    def _start(self, memory: Memory, sentences: Sequence[int]) -> None:
        whole = list(sentences) == list(range(len(memory.source_mask)))
        taken = np.asarray(sentences)
        self._mask = memory.source_mask if whole else memory.source_mask[taken]
        self._lengths = self._mask.sum(1)
        self.count, self.clock, self.ring = len(taken), 0, SMALLEST_RING
        self.age = np.zeros(self.count, np.int64)
        self._visible = np.zeros((self.count, self.width, self.ring, self.width), bool)
        self._store.begin(memory, sentences, self.ring)

    def _append(self, memory: Memory, sentences: Sequence[int]) -> None:
        taken, count = np.asarray(sentences), self.count + len(sentences)
        lengths = memory.source_mask.sum(1)[taken]
        source = max(self._mask.shape[1], int(lengths.max()))
        if source > self._mask.shape[1]:
            source = _rounded(source, SOURCE_UNIT)
        if count > len(self._mask) or source > self._mask.shape[1]:
            room = more_room(len(self._mask), count)
            self._mask = larger(self._mask, (room, source))
            self._visible = larger(self._visible, (room, *self._visible.shape[1:]))
        width = int(lengths.max())
        self._mask[self.count : count] = False
        self._mask[self.count : count, :width] = memory.source_mask[taken, :width]
        self._visible[self.count : count] = False
        self._store.join(memory, sentences, source)
        self._lengths = np.concatenate((self._lengths[: self.count], lengths))
        self.age = np.concatenate((self.age[: self.count], np.zeros(len(taken), np.int64)))
        self.count = count

    def _shrink(self) -> None:
        """Give up columns that only longer sentences needed: every step would go through them."""
        self.age, self._lengths = self.age[: self.count], self._lengths[: self.count]
        source, ring = int(self._lengths.max()), _rounded(int(self.age.max()) + 1, SMALLEST_RING)
        if 2 * source <= self._mask.shape[1]:
            self._mask, self._visible = self._mask[: self.count, :source].copy(), self._visible[: self.count].copy()
            self._store.narrow(source)
        if 2 * ring <= self.ring:
            self._resize(ring)

    def _columns_of_steps(self, steps: int) -> list[Int[np.ndarray, " target"]]:
        """Where the decoder attention of so many next steps has what each sentence reads, its past first."""
        seen, own = self._seen(), np.arange(steps)
        start = seen.start or 0
        past = (seen.stop or self.ring) - start
        return [
            np.concatenate((np.arange(self.clock - age, self.clock) % self.ring - start, past + own))
            for age in self.age.tolist()
        ]

    def _seen(self) -> slice:
        """Columns that somebody sees, at least one; all of them where they come round the ring's end."""
        column, first = self.clock % self.ring, (self.clock - int(self.age.max())) % self.ring
        return slice(first, max(column, first + 1)) if first <= column else slice(None)

    def _have_room(self) -> None:
        """For one more column that nobody still sees."""
        age = int(self.age.max())
        if age >= self.ring:
            self._resize(_rounded(age + 1 + self.ring // 2, SMALLEST_RING))

    def _resize(self, ring: int) -> None:
        """Lay the newest columns out anew in a larger or smaller ring."""
        times = np.arange(max(0, self.clock - min(self.ring, ring)), self.clock)
        before, after = times % self.ring, times % ring
        visible = np.zeros((len(self._visible), self.width, ring, self.width), bool)
        visible[:, :, after] = self._visible[:, :, before]
        self.ring, self._visible = ring, visible
        self._store.resize(before, after, ring)


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit
