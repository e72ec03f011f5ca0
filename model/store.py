"""Where a grid keeps its tensors: memory and state of the running batch, without knowing who sees what of them.

A store moves whole sentences and columns about as the grid says. The one here holds numpy arrays; a model whose steps
run on a device brings one that leaves them there (`export.resident`).
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

from model.steps import Array, Kept, Memory, StepModel


class Store(Protocol):
    """Memory and state of some sentences."""

    def begin(self, memory: Memory, sentences: Sequence[int], ring: int) -> None:
        """Forget everything, and keep the memory of these sentences of a batch, and a blank state.

        Args:
            memory: of the batch.
            sentences: which of them.
            ring: columns of the past.
        """
        ...

    def join(self, memory: Memory, sentences: Sequence[int], source: int) -> None:
        """Keep more sentences, after the others.

        Args:
            memory: of their batch.
            sentences: which of them.
            source: source columns of all from now on; at least as many as now.
        """
        ...

    def leave(self, order: Sequence[int]) -> None:
        """Keep for each place what was at another one before, and no more places; at least one."""
        ...

    def narrow(self, source: int) -> None:
        """Give up all but so many source columns."""
        ...

    def resize(self, before: Int[np.ndarray, " column"], after: Int[np.ndarray, " column"], ring: int) -> None:
        """Lay columns of the past out anew in a ring of another size; what is in the other columns, nobody sees."""
        ...

    def memory(self) -> tuple[Any, ...]:
        """As a step takes it."""
        ...

    def state(self, parents: Int[np.ndarray, "sentence row"]) -> tuple[Any, ...]:
        """As a step takes it, each row's own part as the given row had it."""
        ...

    def write(self, news: Sequence[Any], column: int) -> None:
        """Keep what a step says is to be remembered: in a column of the ring, or in place of what was.

        What several steps say goes into as many columns from there on, if they fit before the ring's end.
        """
        ...


class ArrayStore:
    """numpy arrays with room for more sentences than there are, so that few joins copy those that are under way.

    Args:
        model: whose memory and state they are.
        width: rows of each sentence.
    """

    def __init__(self, model: StepModel, width: int) -> None:
        self._model, self._width = model, width
        self._count, self._room, self._source, self._ring = 0, 0, 0, 0
        self._memory: list[Array] = []
        self._state: list[Array] = []

    def begin(self, memory: Memory, sentences: Sequence[int], ring: int) -> None:
        """See `Store.begin`."""
        whole = list(sentences) == list(range(len(memory.source_mask)))
        taken = np.asarray(sentences)
        self._memory = [tensor if whole else tensor[taken] for tensor in memory.tensors]
        self._count = self._room = len(taken)
        self._source, self._ring = memory.source_mask.shape[1], ring
        self._state = [self._blank(kept) for kept in self._model.state]

    def join(self, memory: Memory, sentences: Sequence[int], source: int) -> None:
        """See `Store.join`."""
        taken, count = np.asarray(sentences), self._count + len(sentences)
        width = min(source, memory.source_mask.shape[1])
        if count > self._room or source > self._source:
            self._reserve(more_room(self._room, count), source)
        new = slice(self._count, count)
        for tensor, arriving, kept in zip(self._memory, memory.tensors, self._model.memory, strict=True):
            cut = _first(kept, width)
            tensor[(new, *cut)] = arriving[taken][(slice(None), *cut)]
        for tensor, kept in zip(self._state, self._model.state, strict=True):
            if "past" not in kept:
                tensor[new] = 0
        self._count = count

    def leave(self, order: Sequence[int]) -> None:
        """See `Store.leave`."""
        for place, before in enumerate(order):
            if place != before:
                for array in (*self._memory, *self._state):
                    array[place] = array[before]
        self._count = len(order)

    def narrow(self, source: int) -> None:
        """See `Store.narrow`."""
        self._source, self._room = source, self._count
        self._memory = [
            tensor[(slice(self._count), *_first(kept, source))].copy()
            for tensor, kept in zip(self._memory, self._model.memory, strict=True)
        ]
        self._state = [tensor[: self._count] for tensor in self._state]

    def resize(self, before: Int[np.ndarray, " column"], after: Int[np.ndarray, " column"], ring: int) -> None:
        """See `Store.resize`."""
        rows, self._ring = np.arange(self._width), ring
        taken, put = ((columns[:, None] * self._width + rows).ravel() for columns in (before, after))
        for index, kept in enumerate(self._model.state):
            if "past" in kept:
                tensor, axis = self._blank(kept), 1 + kept.index("past")
                np.moveaxis(tensor, axis, 0)[put] = np.moveaxis(self._state[index], axis, 0)[taken]
                self._state[index] = tensor

    def memory(self) -> tuple[Array, ...]:
        """See `Store.memory`."""
        return tuple(tensor[: self._count] for tensor in self._memory)

    def state(self, parents: Int[np.ndarray, "sentence row"]) -> tuple[Array, ...]:
        """See `Store.state`."""
        return tuple(
            self._followed(tensor[: self._count], kept, parents)
            for tensor, kept in zip(self._state, self._model.state, strict=True)
        )

    def write(self, news: Sequence[Array], column: int) -> None:
        """See `Store.write`."""
        first = column * self._width
        for tensor, new, kept in zip(self._state, news, self._model.state, strict=True):
            if "past" in kept:
                place = slice(first, first + new.shape[1 + kept.index("past")])
                tensor[(slice(self._count), *(place if size == "past" else slice(None) for size in kept))] = new
            else:
                tensor[: self._count] = new

    def _followed(self, tensor: Array, kept: Kept, parents: Array) -> Array:
        if "row" not in kept or self._width == 1:
            return tensor
        axis = 1 + kept.index("row")
        shape = [self._count if place == 0 else -1 if place == axis else 1 for place in range(tensor.ndim)]
        return np.take_along_axis(tensor, parents.reshape(shape), axis)

    def _blank(self, kept: Kept) -> Array:
        return np.zeros(self._shape(kept, self._room, 0), self._model.dtype)

    def _reserve(self, room: int, source: int) -> None:
        self._room, self._source = room, source
        self._memory = [
            larger(tensor, self._shape(kept, room, source))
            for tensor, kept in zip(self._memory, self._model.memory, strict=True)
        ]
        self._state = [
            larger(tensor, self._shape(kept, room, source))
            for tensor, kept in zip(self._state, self._model.state, strict=True)
        ]

    def _shape(self, kept: Kept, room: int, source: int) -> tuple[int, ...]:
        sizes = {"source": source, "past": self._ring * self._width, "row": self._width}
        return (room, *(sizes[size] if isinstance(size, str) else size for size in kept))


def _first(kept: Kept, source: int) -> tuple[slice, ...]:
    """The first source columns, and all of the rest."""
    return tuple(slice(source) if size == "source" else slice(None) for size in kept)


def more_room(room: int, count: int) -> int:
    """Room for so many sentences, where there was some: more than is needed, unless that is enough."""
    return room if count <= room else max(count, room * 3 // 2)


def larger(array: Array, shape: tuple[int, ...]) -> Array:
    """An array with more room, zero where the other had none."""
    more = np.zeros(shape, array.dtype)
    more[tuple(slice(size) for size in array.shape)] = array
    return more
