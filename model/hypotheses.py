"""Answers, and the attention that follows them through every reordering. Torch-free."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

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
    """What the rows of one sentence looked at in one step; of its own, so that nothing of its batch is kept alive."""

    cross: Float[np.ndarray, "layer head row source"] | None
    """Padding cut off."""
    decoder: Float[np.ndarray, "layer head row read"] | None
    """Over the begin token and what each row has read after it."""


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

    def score(self, options: SearchOptions, trail: Sequence[Glimpse]) -> float:
        """What hypotheses are compared by."""
        score: float = self.total / len(self.tokens) ** options.length_penalty
        if options.coverage_penalty:
            cross = self.cross_attention(trail)
            if cross is None:
                raise ValueError("coverage_penalty needs cross-attention, and the model returned none")
            covered = cross.mean((0, 1)).sum(0).clip(LEAST_COVERAGE, 1.0)
            score += options.coverage_penalty * float(np.log(covered).sum())
        return score

    def cross_row(self, trail: Sequence[Glimpse], t: int) -> Float[np.ndarray, "layer head source"] | None:
        """Attention of the step that chose token t; None where the trail has none."""
        cross = trail[t].cross if trail else None
        return None if cross is None else cross[:, :, self.rows[t]]

    def decoder_row(self, trail: Sequence[Glimpse], t: int) -> Float[np.ndarray, "layer head read"] | None:
        """Attention of the step that chose token t, over the begin token and those before t."""
        decoder = trail[t].decoder if trail else None
        return None if decoder is None else decoder[:, :, self.rows[t]]

    def cross_attention(self, trail: Sequence[Glimpse]) -> Float[np.ndarray, "layer head target source"] | None:
        """The rows that produced the tokens."""
        count = len(self.rows)
        steps = [glimpse.cross for glimpse in trail[:count] if glimpse.cross is not None]
        if not steps:
            return None
        width, looks = steps[0].shape[2], np.concatenate(steps, 2)
        return looks if width == 1 else looks[:, :, np.arange(count) * width + self.rows]

    def decoder_attention(self, trail: Sequence[Glimpse]) -> Float[np.ndarray, "layer head target target"] | None:
        """The rows that produced the tokens; zero above the diagonal."""
        count, first = len(self.rows), self.decoder_row(trail, 0)
        if first is None:
            return None
        weights = np.zeros((*first.shape[:2], count, count), first.dtype)
        for t in range(count):
            weights[:, :, t, : t + 1] = self.decoder_row(trail, t)
        return weights

    def hypothesis(self, score: float, trail: Sequence[Glimpse]) -> Hypothesis:
        """For whoever asked, with the attention that the trail has."""
        return Hypothesis(
            tokens=self.tokens.tolist(),
            log_probabilities=self.log_probabilities.tolist(),
            score=score,
            finish_reason="stop" if self.tokens[-1] == END else "length",
            cross_attention=self.cross_attention(trail),
            decoder_attention=self.decoder_attention(trail),
        )


def bound(total: float, options: SearchOptions) -> float:
    """No continuation of a hypothesis with this total scores higher.

    Totals only fall, the penalty is most lenient at the longest length, and coverage only takes away.
    """
    return total / options.longest**options.length_penalty if total > -math.inf else total
