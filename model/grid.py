"""The running batch: sentences side by side, a fixed number of rows each, with all that is remembered of them.

             row 0   row 1   row 2            Sentences join at the end and leave from anywhere (the last one takes the
sentence 0   a b     a c     a d              place); the steps of the others go on. Keys and values of the past lie in
sentence 1   x       -       -                a ring of columns, written once and never moved: which row sees which
                                              column is a mask, and all that reordering hypotheses changes.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from model.steps import NO_FAMILIES, Array, Family, Kept, Memory, Question, Step, StepModel

SMALLEST_RING = 16
"""Columns of a ring to begin with, and the unit that it grows by."""

SOURCE_UNIT = 8
"""Source lengths are rounded up to a multiple of this, so that a slightly longer one seldom moves the others."""


class Grid:
    """Memory, past and visibility of the sentences being decoded.

    Args:
        model: what computes the steps.
        width: rows of each sentence: hypotheses kept at a time.

    Attributes:
        count: sentences in it.
        age: for each, tokens that its rows have read.
        clock: steps taken.
        ring: columns of the past.
    """

    def __init__(self, model: StepModel, width: int) -> None:
        self._model, self.width = model, width
        self.count, self.clock, self.ring = 0, 0, SMALLEST_RING
        self.age: Int[np.ndarray, " sentence"] = np.zeros(0, np.int64)
        self._lengths: Int[np.ndarray, " sentence"] = np.zeros(0, np.int64)
        self._mask = np.zeros((0, 0), bool)
        self._memory: list[Array] = []
        self._state: list[Array] = []
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
                self._move(before, place)
        self.count = len(order)
        if self.count:
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
        if int(self.age.max()) >= self.ring:
            self._resize(_rounded(int(self.age.max()) + 1 + self.ring // 2, SMALLEST_RING))
        visible = self._visible[:count]
        if width > 1:
            visible[:] = np.take_along_axis(visible, parents[:, :, None, None], 1)
        step = self._model.step(
            Question(
                target_ids=tokens,
                positions=np.broadcast_to(self.age[:, None], tokens.shape).copy(),
                new_visible=np.broadcast_to(self._among, (count, width, width)).copy(),
                past_visible=visible.reshape(count, width, -1),
                next_ids=next_ids,
                top=min(top, self._model.vocabulary),
                memory=Memory(tuple(tensor[:count] for tensor in self._memory), self._mask[:count]),
                state=tuple(self._parents_state(index, parents) for index in range(len(self._state))),
                attention=attention - {"encoder"},
            )
        )
        self._remember(step.state)
        return step

    def columns(self, rows: Int[np.ndarray, "row time"]) -> Int[np.ndarray, "row read"]:
        """Where the newest step's decoder attention has what each row of a sentence has read, its new token last.

        Args:
            rows: which row of the sentence read each token before, in the line that ends in each row.
        """
        count = rows.shape[1]
        times = self.clock - 1 - count + np.arange(count)
        own = self.ring * self.width + np.arange(self.width)[:, None]
        return np.concatenate((times % self.ring * self.width + rows, own), 1)

    def _parents_state(self, index: int, parents: Array) -> Array:
        tensor = self._state[index][: self.count]
        kept = self._model.state[index]
        if "row" in kept and self.width > 1:
            axis = 1 + kept.index("row")
            shape = [self.count if place == 0 else -1 if place == axis else 1 for place in range(tensor.ndim)]
            return np.take_along_axis(tensor, parents.reshape(shape), axis)
        return tensor

    def _remember(self, news: Sequence[Array]) -> None:
        column = self.clock % self.ring
        place = slice(column * self.width, (column + 1) * self.width)
        for tensor, new, kept in zip(self._state, news, self._model.state, strict=True):
            if "past" in kept:
                tensor[(slice(self.count), *(place if size == "past" else slice(None) for size in kept))] = new
            else:
                tensor[: self.count] = new
        self._visible[: self.count, :, column] = self._among
        self.age = self.age + 1
        self.clock += 1

    def _start(self, memory: Memory, sentences: Sequence[int]) -> None:
        whole = list(sentences) == list(range(len(memory.source_mask)))
        taken = np.asarray(sentences)
        self._memory = [tensor if whole else tensor[taken] for tensor in memory.tensors]
        self._mask = memory.source_mask if whole else memory.source_mask[taken]
        self._lengths = self._mask.sum(1)
        self.count, self.clock, self.ring = len(taken), 0, SMALLEST_RING
        self.age = np.zeros(self.count, np.int64)
        self._visible = np.zeros((self.count, self.width, self.ring, self.width), bool)
        self._state = [np.zeros(self._shape(kept, self.count, 0), np.float32) for kept in self._model.state]

    def _append(self, memory: Memory, sentences: Sequence[int]) -> None:
        taken, count = np.asarray(sentences), self.count + len(sentences)
        lengths = memory.source_mask.sum(1)[taken]
        source = max(self._mask.shape[1], int(lengths.max()))
        if source > self._mask.shape[1]:
            source = _rounded(source, SOURCE_UNIT)
        if count > len(self._mask) or source > self._mask.shape[1]:
            self._reserve(max(count, len(self._mask) * 3 // 2), source)
        width = int(lengths.max())
        self._mask[self.count : count] = False
        self._mask[self.count : count, :width] = memory.source_mask[taken, :width]
        for tensor, new, kept in zip(self._memory, memory.tensors, self._model.memory, strict=True):
            cut = tuple(slice(width) if size == "source" else slice(None) for size in kept)
            tensor[(slice(self.count, count), *cut)] = new[taken][(slice(None), *cut)]
        self._visible[self.count : count] = False
        for tensor, kept in zip(self._state, self._model.state, strict=True):
            if "past" not in kept:
                tensor[self.count : count] = 0
        self._lengths = np.concatenate((self._lengths[: self.count], lengths))
        self.age = np.concatenate((self.age[: self.count], np.zeros(len(taken), np.int64)))
        self.count = count

    def _reserve(self, places: int, source: int) -> None:
        places = max(places, len(self._visible))
        self._mask = _larger(self._mask, (places, source))
        self._memory = [
            _larger(tensor, self._shape(kept, places, source))
            for tensor, kept in zip(self._memory, self._model.memory, strict=True)
        ]
        self._state = [
            _larger(tensor, self._shape(kept, places, source))
            for tensor, kept in zip(self._state, self._model.state, strict=True)
        ]
        self._visible = _larger(self._visible, (places, *self._visible.shape[1:]))

    def _shape(self, kept: Kept, places: int, source: int) -> tuple[int, ...]:
        sizes = {"source": source, "past": self.ring * self.width, "row": self.width}
        return (places, *(sizes[size] if isinstance(size, str) else size for size in kept))

    def _move(self, before: int, place: int) -> None:
        for array in (*self._memory, *self._state, self._mask, self._visible, self._lengths, self.age):
            array[place] = array[before]

    def _shrink(self) -> None:
        """Give up columns that only longer sentences needed: every step would go through them."""
        self.age, self._lengths = self.age[: self.count], self._lengths[: self.count]
        source, ring = int(self._lengths.max()), _rounded(int(self.age.max()) + 1, SMALLEST_RING)
        if 2 * source <= self._mask.shape[1]:
            self._mask = self._mask[: self.count, :source].copy()
            self._memory = [
                tensor[
                    (slice(self.count), *(slice(source) if size == "source" else slice(None) for size in kept))
                ].copy()
                for tensor, kept in zip(self._memory, self._model.memory, strict=True)
            ]
        if 2 * ring <= self.ring:
            self._resize(ring)

    def _resize(self, ring: int) -> None:
        """Lay the newest columns out anew in a larger or smaller ring."""
        times = np.arange(max(0, self.clock - min(self.ring, ring)), self.clock)
        before, after = times % self.ring, times % ring
        visible = np.zeros((len(self._visible), self.width, ring, self.width), bool)
        visible[:, :, after] = self._visible[:, :, before]
        rows = np.arange(self.width)
        taken, put = ((columns[:, None] * self.width + rows).ravel() for columns in (before, after))
        self.ring, self._visible = ring, visible
        for index, kept in enumerate(self._model.state):
            if "past" in kept:
                tensor = np.zeros(self._shape(kept, len(visible), 0), np.float32)
                axis = 1 + kept.index("past")
                np.moveaxis(tensor, axis, 0)[put] = np.moveaxis(self._state[index], axis, 0)[taken]
                self._state[index] = tensor


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _larger(array: Array, shape: tuple[int, ...]) -> Array:
    larger = np.zeros(shape, array.dtype)
    larger[tuple(slice(size) for size in array.shape)] = array
    return larger
