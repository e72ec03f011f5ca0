"""How one sentence is decoded, as plain checked values. Torch-free."""

from dataclasses import dataclass

from model.errors import InvalidRequestError
from model.vocabulary import BEGIN, END, PAD

LARGEST_BEAM = 16
"""Most hypotheses kept at a time: beyond it, beam search costs more and finds worse answers."""

LARGEST_PENALTY = 10.0
"""Beyond it, length or coverage alone decides between hypotheses."""

LARGEST_TEMPERATURE = 100.0
"""Beyond it, every token is as likely as any other."""

LARGEST_SEED = 2**63 - 1

MOST_SUPPRESSED = 256
"""Tokens that one sentence may rule out: each costs a candidate more in every step."""

UNWRITABLE = frozenset({PAD, BEGIN})
"""Tokens that stand for no text: a hypothesis with one would look the same as one without. They are never generated."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Draw each token instead of taking the best.

    Raises:
        InvalidRequestError: a value is out of its range; wherever it is found, named as a request has it, by its path.
    """

    temperature: float = 1.0
    """Log-probabilities are divided by it: below 1 the likely becomes likelier."""
    top_k: int = 0
    """Draw from so many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens whose probabilities (after the temperature) sum to at least this."""
    seed: int = 0
    """The same seed draws the same answer."""

    def __post_init__(self) -> None:
        _check("sampling.temperature", self.temperature, 0.01, LARGEST_TEMPERATURE)
        _check("sampling.top_k", self.top_k, 0, None)
        _check("sampling.top_p", self.top_p, 1e-6, 1.0)
        _check("sampling.seed", self.seed, 0, LARGEST_SEED)


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How one sentence is decoded.

    Raises:
        InvalidRequestError: a value is out of its range, or two do not go together.
    """

    longest: int
    """Most tokens to generate, the end token among them."""
    shortest: int = 1
    """Fewest tokens to generate, the end token among them."""
    beam_size: int = 1
    """Hypotheses kept at a time; 1 is greedy search."""
    hypotheses: int = 1
    """How many of them to return, best first (n-best)."""
    length_penalty: float = 1.0
    """Hypotheses are compared by log-probability / length ** length_penalty; 0 compares plain log-probabilities, 1
    compares the mean for each token. Lengths count the end token."""
    coverage_penalty: float = 0.0
    """Weight of the coverage term in a finished hypothesis's score (Wu et al. 2016, section 7): the sum over source
    tokens of log(min(1, attention that the token received)), attention being the mean of all layers and heads."""
    prefix: tuple[int, ...] = ()
    """Ids that the answer must begin with; they count towards its length, log-probability and score."""
    no_repeat_ngram: int = 0
    """No run of so many tokens occurs twice; 0 allows any."""
    suppressed: frozenset[int] = frozenset()
    """Ids that are never generated."""
    sampling: Sampling | None = None
    """Draw tokens instead of searching; with beam_size 1."""

    def __post_init__(self) -> None:
        _check("beam_size", self.beam_size, 1, LARGEST_BEAM)
        _check("hypotheses", self.hypotheses, 1, self.beam_size, " (beam_size)")
        _check("length_penalty", self.length_penalty, 0.0, LARGEST_PENALTY)
        _check("coverage_penalty", self.coverage_penalty, 0.0, LARGEST_PENALTY)
        _check("longest", self.longest, 1, None)
        _check("shortest", self.shortest, 1, self.longest, " (longest)")
        _check("no_repeat_ngram", self.no_repeat_ngram, 0, None)
        _check("suppressed", len(self.suppressed), 0, MOST_SUPPRESSED, " tokens")
        _check("prefix", len(self.prefix), 0, self.longest - 1, " tokens (below longest)")
        if END in self.suppressed:
            raise InvalidRequestError("suppressed", "holds the end token: set shortest instead")
        if {*self.prefix} & {*UNWRITABLE, END}:
            raise InvalidRequestError("prefix", "holds a padding, begin or end token")
        if self.sampling is not None and self.beam_size > 1:
            raise InvalidRequestError("sampling", f"draws one answer, beam_size={self.beam_size} searches: choose one")

    def check_vocabulary(self, size: int) -> None:
        """Refuse ids that a vocabulary of so many entries does not have.

        Raises:
            InvalidRequestError: with the id and the limit.
        """
        for name, ids in (("prefix", self.prefix), ("suppressed", sorted(self.suppressed))):
            for index in ids:
                _check(name, index, 0, size - 1, " (ids of the vocabulary)")


def _check(name: str, value: float, low: float, high: float | None, why: str = "") -> None:
    if not (low <= value and (high is None or value <= high)):  # so written that NaN fails
        raise InvalidRequestError(
            name, f"{value} is not {f'at least {low}' if high is None else f'from {low} to {high}{why}'}"
        )
