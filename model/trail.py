"""What the rows of a sentence looked at, step by step, until its answers are known. Torch-free."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

SEEN = 16
"""Steps whose attention to the source is kept as it was computed, before each sentence copies its own."""


class Seen:
    """What a batch looked at in the source in its last steps, as it was computed.

    To let each sentence copy its own part of every step would cost more than the attention does.

    Attributes:
        steps: how many these are.
    """

    def __init__(self) -> None:
        self.steps, self._begin = 0, 0
        self._looks: list[Float[np.ndarray, "sentence layer head step row source"]] = []

    @property
    def end(self) -> int:
        """Arrays that there have been."""
        return self._begin + len(self._looks)

    def add(self, looks: Float[np.ndarray, "sentence layer head step row source"]) -> None:
        """Keep what was looked at in some more steps."""
        self._looks.append(looks)
        self.steps += looks.shape[3]

    def since(self, end: int) -> list[Float[np.ndarray, "sentence layer head step row source"]]:
        """The arrays that came after the first so many."""
        return self._looks[end - self._begin :]

    def clear(self) -> None:
        """Keep nothing of them."""
        self._begin = self.end
        self._looks.clear()
        self.steps = 0


class Glimpse(NamedTuple):
    """What the rows of one sentence looked at in some steps."""

    begin: int
    """Steps before these."""
    weights: Float[np.ndarray, "layer head step row seen"]
    """Over the source; or over the begin token and what a row had read to the last of these steps, zero for what it
    read in a later step."""


class Trail:
    """All steps of one sentence.

    Args:
        source_length: tokens of its source.
    """

    def __init__(self, source_length: int) -> None:
        self._source_length = source_length
        self._new: list[tuple[Float[np.ndarray, "sentence layer head step row source"], int]] = []
        self._cross: list[Glimpse] = []
        self._decoder: list[Glimpse] = []

    def add_cross(self, looks: Iterable[Float[np.ndarray, "sentence layer head step row source"]], place: int) -> None:
        """Keep what was looked at in the source in the next steps: arrays of a whole batch, until `copy_cross`.

        Args:
            looks: of one step or several each.
            place: which sentence of them.
        """
        self._new += [(batch, place) for batch in looks]

    def copy_cross(self) -> None:
        """Copy what came since the last time, so that nothing is kept of the arrays that it lies in."""
        if self._new:
            _add(
                self._cross, np.concatenate([batch[place, ..., : self._source_length] for batch, place in self._new], 2)
            )
            self._new.clear()

    def add_decoder(self, looks: Float[np.ndarray, "layer head step row read"]) -> None:
        """Keep what was looked at in the target in the next steps: an array of its own. See `Glimpse`."""
        _add(self._decoder, looks)

    def cross(self, rows: Int[np.ndarray, " target"]) -> Float[np.ndarray, "layer head target source"] | None:
        """What the given row of each step looked at, from the first: a copy; None where that is not kept."""
        if not self._new and not self._cross:
            return None
        count, begin, width = len(rows), _steps(self._cross), self._source_length
        parts = [_chosen(glimpse.weights, rows[glimpse.begin :]) for glimpse in self._cross if glimpse.begin < count]
        for batch, place in self._new:
            if begin >= count:
                break
            *_, steps, beam_size, _ = batch.shape
            if beam_size == 1:
                parts.append(batch[place, :, :, : count - begin, 0, :width])
            elif steps == 1:
                parts.append(batch[place, :, :, :, rows[begin], :width])
            else:
                parts.append(_chosen(batch[place, ..., :width], rows[begin:]))
            begin += steps
        return np.concatenate(parts, 2)

    def decoder(self, rows: Int[np.ndarray, " target"]) -> Float[np.ndarray, "layer head target target"] | None:
        """As `cross`, over the begin token and all tokens but the last; zero above the diagonal."""
        count = len(rows)
        if not self._decoder:
            return None
        first = self._decoder[0].weights
        weights = np.zeros((*first.shape[:2], count, count), first.dtype)
        for glimpse in self._decoder:
            if glimpse.begin >= count:
                break
            own = _chosen(glimpse.weights, rows[glimpse.begin :])
            end = glimpse.begin + own.shape[2]
            weights[:, :, glimpse.begin : end, :end] = own[..., :end]
        return weights

    def step(
        self, rows: Int[np.ndarray, " target"], t: int
    ) -> tuple[Float[np.ndarray, "layer head source"] | None, Float[np.ndarray, "layer head read"] | None]:
        """What the given row of step t looked at: in the source, and in what had been read by then."""
        cross, decoder = (_at(glimpses, int(rows[t]), t) for glimpses in (self._cross, self._decoder))
        return cross, None if decoder is None else decoder[..., : t + 1]


def _add(glimpses: list[Glimpse], looks: Float[np.ndarray, "layer head step row seen"]) -> None:
    glimpses.append(Glimpse(_steps(glimpses), looks))


def _steps(glimpses: Sequence[Glimpse]) -> int:
    return glimpses[-1].begin + glimpses[-1].weights.shape[2] if glimpses else 0


def _chosen(
    looks: Float[np.ndarray, "layer head step row seen"], rows: Int[np.ndarray, " target"]
) -> Float[np.ndarray, "layer head target_step seen"]:
    """One row of each of the steps, as far as there are rows chosen."""
    if looks.shape[3] == 1:
        return looks[:, :, : len(rows), 0]
    steps = np.arange(min(len(rows), looks.shape[2]))
    chosen: Float[np.ndarray, "layer head target_step seen"] = looks[:, :, steps, rows[: len(steps)]]
    return chosen


def _at(glimpses: list[Glimpse], row: int, t: int) -> Float[np.ndarray, "layer head seen"] | None:
    if not glimpses:
        return None
    begin, looks = glimpses[bisect_right(glimpses, t, key=lambda one: one.begin) - 1]
    return looks[:, :, t - begin, row]
