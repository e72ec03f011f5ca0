"""The step protocol: what a search asks of a network, be it PyTorch's or ONNX Runtime's. Torch-free."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Memory:
    """What a step model remembers of a batch of sources."""

    tensors: Any
    """The model's own: arrays whose first axis is the sentence."""
    source_mask: Bool[np.ndarray, "batch source"]
    """True for real source tokens."""
    encoder_attention: Float[np.ndarray, "batch layer head source source"]
    """Encoder self-attention."""


@dataclass(frozen=True)
class Step:
    """What a step model says about some new positions."""

    top_log_probabilities: Float[np.ndarray, "row new top"]
    """The best next tokens' log-probabilities after each new position, best first."""
    top_ids: Int[np.ndarray, "row new top"]
    """Their ids."""
    cross_attention: Float[np.ndarray, "row layer head new source"]
    """Attention of each new position to the source."""
    decoder_attention: Float[np.ndarray, "row layer head new target"]
    """Attention of each new position to the target so far, right-aligned where rows differ in age."""
    state: Any
    """The model's own, for the next step."""


@dataclass(frozen=True)
class Scores:
    """What a step model says about given targets."""

    log_probabilities: Float[np.ndarray, "row new"]
    """Log-probability of each given next token."""
    cross_attention: Float[np.ndarray, "row layer head new source"]
    decoder_attention: Float[np.ndarray, "row layer head new target"]


class StepModel(Protocol):
    """A network that decodes step by step: PyTorch's or ONNX Runtime's."""

    def encode(
        self, source_ids: Int[np.ndarray, "batch source"], source_mask: Bool[np.ndarray, "batch source"]
    ) -> Memory:
        """Read a padded batch of sources."""
        ...

    def select(self, memory: Memory, sentences: Int[np.ndarray, " kept"]) -> Memory:
        """The memory of some of the sentences."""
        ...

    def step(
        self,
        target_ids: Int[np.ndarray, "row new"],
        positions: Int[np.ndarray, "row new"],
        memory: Memory,
        state: Any,
        state_rows: Int[np.ndarray, " row"],
        top: int,
    ) -> Step:
        """Read new tokens in every row.

        Args:
            target_ids: the new tokens; row = sentence * beam, the beams of a sentence side by side.
            positions: their positions in the row.
            memory: of as many sentences as divide the rows.
            state: what the last step returned; None at the start.
            state_rows: for each row, the row of `state` that it goes on from.
            top: how many candidates to return; at most the size of the vocabulary.
        """
        ...

    def score(
        self,
        target_ids: Int[np.ndarray, "row new"],
        next_ids: Int[np.ndarray, "row new"],
        memory: Memory,
    ) -> Scores:
        """Read whole targets at once, and say how likely each given next token was."""
        ...


def pad(
    sequences: Sequence[Sequence[int]], value: int = 0
) -> tuple[Int[np.ndarray, "batch source"], Bool[np.ndarray, "batch source"]]:
    """Pad on the right to the longest; returns ids and a mask that is true for real tokens."""
    lengths = np.array([len(sequence) for sequence in sequences])
    mask = np.arange(lengths.max())[None, :] < lengths[:, None]
    ids = np.full(mask.shape, value, np.int64)
    ids[mask] = np.concatenate([np.asarray(sequence, np.int64) for sequence in sequences])
    return ids, mask
