"""Answers, and the attention that follows them through every reordering. Torch-free."""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from model.options import SearchOptions
from model.steps import Family
from model.trail import Trail
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

    def node(self, t: int) -> "Node":
        """Its token t, with the attention of that step."""
        cross, decoder = self.cross_attention, self.decoder_attention
        return Node(
            self.tokens[t],
            self.log_probabilities[t],
            None if cross is None else cross[:, :, t],
            None if decoder is None else decoder[:, :, t, : t + 1],
        )


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

    def score(self, options: SearchOptions, trail: Trail) -> float:
        """What hypotheses are compared by."""
        score: float = self.total / len(self.tokens) ** options.length_penalty
        if options.coverage_penalty:
            cross = trail.cross(self.rows)
            if cross is None:
                raise ValueError("coverage_penalty needs cross-attention, and the model returned none")
            covered = cross.mean((0, 1)).sum(0).clip(LEAST_COVERAGE, 1.0)
            score += options.coverage_penalty * float(np.log(covered).sum())
        return score

    def hypothesis(self, score: float, trail: Trail, attention: frozenset[Family]) -> Hypothesis:
        """For whoever asked, with the attention that was asked for."""
        return Hypothesis(
            tokens=self.tokens.tolist(),
            log_probabilities=self.log_probabilities.tolist(),
            score=score,
            finish_reason="stop" if self.tokens[-1] == END else "length",
            cross_attention=trail.cross(self.rows) if "cross" in attention else None,
            decoder_attention=trail.decoder(self.rows) if "decoder" in attention else None,
        )


def bound(total: float, options: SearchOptions) -> float:
    """No continuation of a hypothesis with this total scores higher.

    Totals only fall, the penalty is most lenient at the longest length, and coverage only takes away.
    """
    return total / options.longest**options.length_penalty if total > -math.inf else total
