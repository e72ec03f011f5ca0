"""What the rows of a sentence looked at, step by step, until its answers are known. Torch-free."""

from bisect import bisect_right
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Glimpse(NamedTuple):
    """What the rows of one sentence looked at in some steps; of its own, so that nothing of its batch is kept alive."""

    begin: int
    """Steps before these."""
    weights: Float[np.ndarray, "layer head step row seen"]
    """Over the source; or over the begin token and what a row had read to the last of these steps, zero for what it
    read in a later step."""


class Trail:
    """All steps of one sentence."""

    def __init__(self) -> None:
        self._cross, self._decoder = list[Glimpse](), list[Glimpse]()

    def add_cross(self, looks: Float[np.ndarray, "layer head step row source"]) -> None:
        """Keep what was looked at in the source in the next steps: an array of its own, padding cut off."""
        _add(self._cross, looks)

    def add_decoder(self, looks: Float[np.ndarray, "layer head step row read"]) -> None:
        """Keep what was looked at in the target in the next steps: an array of its own. See `Glimpse`."""
        _add(self._decoder, looks)

    def cross(self, rows: Int[np.ndarray, " target"]) -> Float[np.ndarray, "layer head target source"] | None:
        """What the given row of each step looked at, from the first; None where that is not kept."""
        if not self._cross:
            return None
        looks = [glimpse.weights for glimpse in self._cross]
        return _chosen(looks[0] if len(looks) == 1 else np.concatenate(looks, 2), rows)

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
    begin = glimpses[-1].begin + glimpses[-1].weights.shape[2] if glimpses else 0
    glimpses.append(Glimpse(begin, looks))


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
