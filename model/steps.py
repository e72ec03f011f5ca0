"""The step protocol: what a search asks of a network, be it PyTorch's or ONNX Runtime's. Torch-free.

A model has no state of its own: what it is to remember goes in and comes out as arrays, whose first axis is the
sentence. `model.grid` keeps them between steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

Array: TypeAlias = np.ndarray[Any, Any]

Family: TypeAlias = Literal["encoder", "decoder", "cross"]
"""A family of attention."""

ALL_FAMILIES: frozenset[Family] = frozenset({"encoder", "decoder", "cross"})
NO_FAMILIES: frozenset[Family] = frozenset()

Kept: TypeAlias = tuple[int | Literal["source", "past", "row"], ...]
"""Sizes of what a model remembers of one sentence. "source" is as long as the source; "past" grows by what is new at
each step, whose part alone the model returns; "row" has one entry for each hypothesis, and is returned anew."""


@dataclass(frozen=True)
class Memory:
    """What a step model remembers of a batch of sources."""

    tensors: tuple[Any, ...]
    """Laid out as the model's `memory` says: arrays, or handles of what a model keeps on its device."""
    source_mask: Bool[np.ndarray, "batch source"]
    """True for real source tokens."""
    encoder_attention: Float[np.ndarray, "batch layer head source source"] | None = None
    """Encoder self-attention, where it was asked for; zero in padding."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a step model is to read, and to say about it."""

    target_ids: Int[np.ndarray, "batch query"]
    """New tokens: one for each hypothesis of a sentence, or many of one."""
    positions: Int[np.ndarray, "batch query"]
    """Their positions from 0."""
    new_visible: Bool[np.ndarray, "batch query query"]
    """Which of the new positions each one sees, itself among them."""
    past_visible: Bool[np.ndarray, "batch query past"]
    """Which of the past positions each one sees."""
    next_ids: Int[np.ndarray, "batch query"]
    """Tokens whose log-probability after each new position is wanted, whatever is likely."""
    top: int
    """How many candidates are wanted; at most the size of the vocabulary."""
    memory: Memory
    """Of the same sentences."""
    state: tuple[Any, ...]
    """Laid out as the model's `state` says: arrays, or handles of what a model keeps on its device."""
    attention: frozenset[Family] = NO_FAMILIES
    """Families to return."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step model says about some new positions."""

    top_log_probabilities: Float[np.ndarray, "batch query top"]
    """The best next tokens' log-probabilities after each new position, best first."""
    top_ids: Int[np.ndarray, "batch query top"]
    """Their ids."""
    next_log_probabilities: Float[np.ndarray, "batch query"]
    """Log-probabilities of the tokens asked about."""
    cross_attention: Float[np.ndarray, "batch layer head query source"] | None
    """Attention of each new position to the source, where it was asked for."""
    decoder_attention: Float[np.ndarray, "batch layer head query target"] | None
    """Attention of each new position to the past and then to the new positions, where it was asked for."""
    state: tuple[Any, ...] = field(repr=False)
    """What is to be remembered of the new positions: arrays where the question had arrays."""


@dataclass(frozen=True, kw_only=True)
class GreedySteps:
    """What a step model says that took several steps by itself."""

    ids: Int[np.ndarray, "step batch"]
    """The likeliest token of each step, which the next one read; after an end token they mean nothing."""
    log_probabilities: Float[np.ndarray, "step batch"]
    """Their log-probabilities: NaN where the network gave no numbers."""
    cross_attention: Float[np.ndarray, "batch layer head step source"] | None
    """Attention of each step to the source, where it was asked for."""
    decoder_attention: Float[np.ndarray, "batch layer head step target"] | None
    """Attention of each step to the past and then to the steps, where it was asked for; there may be columns beyond."""
    state: tuple[Any, ...] = field(repr=False)
    """What is to be remembered of them all: "past" has one entry for each step."""


class StepModel(Protocol):
    """A network that decodes step by step: PyTorch's or ONNX Runtime's."""

    @property
    def memory(self) -> Sequence[Kept]:
        """How `Memory.tensors` are laid out, without the sentence."""
        ...

    @property
    def state(self) -> Sequence[Kept]:
        """How the state is laid out, without the sentence."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type of the state."""
        ...

    @property
    def vocabulary(self) -> int:
        """Entries of the target vocabulary."""
        ...

    def encode(
        self,
        source_ids: Int[np.ndarray, "batch source"],
        source_mask: Bool[np.ndarray, "batch source"],
        attention: bool = True,
    ) -> Memory:
        """Read a padded batch of sources; with encoder attention, or without its price."""
        ...

    def step(self, question: Question) -> Step:
        """Read new tokens."""
        ...


@runtime_checkable
class StepsAhead(Protocol):
    """A step model that can take several greedy steps in one call."""

    def greedy(self, question: Question, steps: int, fewest: int) -> GreedySteps:
        """Read new tokens, one a sentence, and go on from them.

        Args:
            question: the first step, of one row a sentence. Candidates are not to be had.
            steps: most steps to take.
            fewest: stop once no more sentences than this are without an end token.
        """
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


def causal(count: int) -> Bool[np.ndarray, "1 count count"]:
    """Each new position sees itself and those before it."""
    return np.tri(count, dtype=bool)[None]
