"""What the rows of one sentence looked at, step by step, until its answers are known. Torch-free."""

from bisect import bisect_right
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Glimpse(NamedTuple):
    """What the rows of one sentence looked at in some steps; of its own, so that nothing of its batch is kept alive."""

    begin: int
    """Steps before these."""
    cross: Float[np.ndarray, "layer head step_row source"] | None
    """The rows of each step in turn; padding cut off."""
    decoder: Float[np.ndarray, "layer head step_row read"] | None
    """Over the begin token and what each row has read after it; zero for what it read in a later step."""


class Trail:
    """All steps of one sentence.

    Args:
        width: its rows.
    """

    def __init__(self, width: int) -> None:
        self._width, self._glimpses = width, list[Glimpse]()

    def add(self, glimpse: Glimpse) -> None:
        """Keep what was seen in the next steps; every step has the same families."""
        self._glimpses.append(glimpse)

    def cross(self, rows: Int[np.ndarray, " target"]) -> Float[np.ndarray, "layer head target source"] | None:
        """What the given row of each step looked at, from the first; None where that is not kept."""
        looks = [glimpse.cross for glimpse in self._glimpses if glimpse.cross is not None]
        if not looks:
            return None
        return self._chosen(looks[0] if len(looks) == 1 else np.concatenate(looks, 2), rows)

    def decoder(self, rows: Int[np.ndarray, " target"]) -> Float[np.ndarray, "layer head target target"] | None:
        """As `cross`, over the begin token and all tokens but the last; zero above the diagonal."""
        count = len(rows)
        looks = [(glimpse.begin, glimpse.decoder) for glimpse in self._glimpses if glimpse.decoder is not None]
        if not looks:
            return None
        weights = np.zeros((*looks[0][1].shape[:2], count, count), looks[0][1].dtype)
        for begin, look in looks:
            if begin >= count:
                break
            own = self._chosen(look, rows[begin : begin + look.shape[2] // self._width])
            end = begin + own.shape[2]
            weights[:, :, begin:end, :end] = own[..., :end]
        return weights

    def step(
        self, rows: Int[np.ndarray, " target"], t: int
    ) -> tuple[Float[np.ndarray, "layer head source"] | None, Float[np.ndarray, "layer head read"] | None]:
        """What the given row of step t looked at: in the source, and in what had been read by then."""
        if not self._glimpses:
            return None, None
        begin, cross, decoder = self._glimpses[bisect_right(self._glimpses, t, key=lambda one: one.begin) - 1]
        place = (t - begin) * self._width + int(rows[t])
        return (
            None if cross is None else cross[:, :, place],
            None if decoder is None else decoder[:, :, place, : t + 1],
        )

    def _chosen(
        self, looks: Float[np.ndarray, "layer head step_row seen"], rows: Int[np.ndarray, " step"]
    ) -> Float[np.ndarray, "layer head step seen"]:
        """One row of each step."""
        if self._width == 1:
            return looks[:, :, : len(rows)]
        chosen: Float[np.ndarray, "layer head step seen"] = looks.take(np.arange(len(rows)) * self._width + rows, 2)
        return chosen
