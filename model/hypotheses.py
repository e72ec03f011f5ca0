"""Answers, and the attention that follows them through every reordering. Torch-free."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from model.options import SearchOptions
from model.vocabulary import END

LEAST_COVERAGE = 1e-9
"""Attention below which a source token counts as this much covered: a logarithm must stay finite."""


@dataclass(frozen=True)
class Hypothesis:
    """One answer, with the attention that produced it.

    Row t of the attention belongs to the step that chose token t, whose input was token t - 1 (the begin token for t =
    0). So the columns of `decoder_attention` are the begin token and all tokens but the last.
    """

    tokens: list[int]
    """Generated ids; the end token is last unless the length limit came first."""
    log_probabilities: list[float]
    """Natural logarithm of each token's probability, given those before it."""
    score: float
    """Total log-probability / length ** length_penalty, and the coverage term: what hypotheses are compared by."""
    finish_reason: Literal["stop", "length"]
    """Whether the model ended the sentence, or the limit did."""
    cross_attention: Float[np.ndarray, "layer head target source"] | None = field(default=None, repr=False)
    """Padding of the batch cut off; None where it was not asked for."""
    decoder_attention: Float[np.ndarray, "layer head target target"] | None = field(default=None, repr=False)

    @property
    def log_probability(self) -> float:
        """Log-probability of the whole hypothesis."""
        return sum(self.log_probabilities)


class Glimpse(NamedTuple):
    """What the rows of one sentence looked at in one step."""

    cross: Float[np.ndarray, "layer head row source"] | None
    decoder: Float[np.ndarray, "layer head row column"] | None
    clock: int
    """The grid's, when the sentence joined."""
    ring: int
    """Columns of the grid's past in this step."""

    def column(self, time: int | Int[np.ndarray, " time"], row: int | Int[np.ndarray, " time"]) -> Any:
        """Column of the decoder attention that holds what a row read at an earlier step of the sentence."""
        width = self._width
        return (self.clock + time) % self.ring * width + row

    def own(self, row: int) -> int:
        """Column of what a row read in this step."""
        return self.ring * self._width + row

    @property
    def _width(self) -> int:
        return 0 if self.decoder is None else self.decoder.shape[2]


@dataclass(frozen=True)
class Node:
    """One generated token that is certain, with its attention."""

    token: int
    log_probability: float
    cross_attention: Float[np.ndarray, "layer head source"] | None
    decoder_attention: Float[np.ndarray, "layer head target"] | None
    """Over the begin token and those before this one."""


@dataclass(frozen=True)
class Chain:
    """One hypothesis as the search keeps it."""

    tokens: Int[np.ndarray, " target"]
    log_probabilities: Float[np.ndarray, " target"]
    rows: Int[np.ndarray, " target"]
    """Which row of the sentence chose each token."""
    total: float
    """Total log-probability."""

    def score(self, options: SearchOptions, trail: Sequence[Glimpse], source_length: int) -> float:
        """What hypotheses are compared by."""
        score: float = self.total / len(self.tokens) ** options.length_penalty
        if options.coverage_penalty:
            cross = self.cross_attention(trail, source_length)
            covered = cross.mean((0, 1)).sum(0).clip(LEAST_COVERAGE, 1.0)
            score += options.coverage_penalty * float(np.log(covered).sum())
        return score

    def cross_attention(
        self, trail: Sequence[Glimpse], source_length: int
    ) -> Float[np.ndarray, "layer head target source"]:
        """The rows that produced the tokens."""
        return np.stack([cross_row(trail, self.rows, t, source_length) for t in range(len(self.rows))], 2)

    def decoder_attention(self, trail: Sequence[Glimpse]) -> Float[np.ndarray, "layer head target target"]:
        """The rows that produced the tokens; zero above the diagonal."""
        count = len(self.rows)
        first = decoder_row(trail, self.rows, 0)
        weights = np.zeros((*first.shape[:2], count, count), first.dtype)
        for t in range(count):
            weights[:, :, t, : t + 1] = decoder_row(trail, self.rows, t)
        return weights

    def hypothesis(self, score: float, trail: Sequence[Glimpse], source_length: int) -> Hypothesis:
        """For whoever asked, with the attention that was asked for."""
        looked = trail[0] if trail else None
        return Hypothesis(
            tokens=self.tokens.tolist(),
            log_probabilities=self.log_probabilities.tolist(),
            score=score,
            finish_reason="stop" if self.tokens[-1] == END else "length",
            cross_attention=self.cross_attention(trail, source_length)
            if trail and trail[0].cross is not None
            else None,
            decoder_attention=self.decoder_attention(trail) if looked and looked.decoder is not None else None,
        )


def cross_row(
    trail: Sequence[Glimpse], rows: Int[np.ndarray, " target"], t: int, source_length: int
) -> Float[np.ndarray, "layer head source"]:
    """Cross-attention of the step that chose token t."""
    cross = trail[t].cross
    if cross is None:
        raise ValueError("cross-attention was not asked for")
    row: np.ndarray = cross[:, :, rows[t], :source_length]
    return row


def decoder_row(
    trail: Sequence[Glimpse], rows: Int[np.ndarray, " target"], t: int
) -> Float[np.ndarray, "layer head read"]:
    """Decoder attention of the step that chose token t, over the begin token and those before t."""
    glimpse = trail[t]
    if glimpse.decoder is None:
        raise ValueError("decoder attention was not asked for")
    columns = np.append(glimpse.column(np.arange(t), rows[:t]), glimpse.own(rows[t]))
    row: np.ndarray = glimpse.decoder[:, :, rows[t]][:, :, columns]
    return row


def bound(total: float, options: SearchOptions) -> float:
    """No continuation of a hypothesis with this total scores higher.

    Totals only fall, the penalty is most lenient at the longest length, and coverage only takes away.
    """
    return total / options.longest**options.length_penalty if total > -math.inf else total
