"""What the rows of a running batch looked at in the source, for the newest steps. Torch-free.

A step's attention belongs to all sentences of the batch; each is to have its own, and to keep nothing else alive. To
copy it sentence by sentence in every step would cost more than to compute it. So it is written down for all of them at
once, and each sentence copies its part when it leaves, when somebody wants to see it, or when there is no more room.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from model.sentence import Sentence

ROOM = 16
"""Steps that are written down before the sentences must copy them."""


class Looks:
    """Cross-attention of the newest steps of a batch."""

    def __init__(self) -> None:
        self._block: Float[np.ndarray, "room sentence layer head row source"] = np.empty((0,) * 6, np.float32)
        self._steps = 0
        self._begins: list[int] = []  # for each sentence, the first of the steps that it has not copied

    def write(self, sentences: Sequence[Sentence], looks: Float[np.ndarray, "sentence layer head row source"]) -> None:
        """Write down a step of all sentences of the batch."""
        count, source = len(looks), looks.shape[-1]
        if self._steps == ROOM or not self._has_room(looks.shape):
            self.hand_over(sentences[: len(self._begins)])
            self._steps, self._begins = 0, []
        if not self._steps and not (self._has_room(looks.shape) and self._block.size <= 2 * ROOM * looks.size):
            self._block = np.empty((ROOM, *looks.shape), looks.dtype)
        self._begins += [self._steps] * (count - len(self._begins))
        self._block[self._steps, :count, ..., :source] = looks
        self._steps += 1

    def hand_over(self, sentences: Sequence[Sentence]) -> None:
        """Let some sentences copy what they have not yet of theirs."""
        for sentence in sentences:
            place = sentence.place
            if place < len(self._begins) and self._begins[place] < self._steps:
                looks = self._block[self._begins[place] : self._steps, place]
                sentence.look_at_source(looks.transpose(1, 2, 0, 3, 4))
                self._begins[place] = self._steps

    def keep(self, order: Sequence[int]) -> None:
        """Sentences have left, and others moved.

        Args:
            order: for each place that is still taken, the place that its sentence had before.
        """
        if not self._steps:
            return
        # Who has joined since the last step has nothing here yet.
        begins = [self._begins[before] if before < len(self._begins) else self._steps for before in order]
        for place, before in enumerate(order):
            if before != place and begins[place] < self._steps:
                self._block[: self._steps, place] = self._block[: self._steps, before]
        self._begins = begins

    def _has_room(self, shape: Sequence[int]) -> bool:
        block: tuple[int, ...] = self._block.shape
        return block[1] >= shape[0] and block[-1] >= shape[-1]
