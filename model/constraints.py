"""What an answer may not contain: candidates are ruled out before the search chooses. Torch-free."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from model.options import UNWRITABLE, SearchOptions
from model.vocabulary import BEGIN, END, PAD


class Constraints:
    """The constraints of one sentence, and its random numbers.

    Args:
        options: how it is decoded.
        vocabulary: entries of the target vocabulary.
    """

    def __init__(self, options: SearchOptions, vocabulary: int) -> None:
        self._options, self._vocabulary = options, vocabulary
        self._suppressed = np.array(sorted(options.suppressed), np.int64)
        self._draw = np.random.default_rng(options.sampling.seed) if options.sampling is not None else None
        self.idle = (
            options.shortest == 1
            and not options.prefix
            and not options.no_repeat_ngram
            and not options.suppressed
            and options.sampling is None
        )
        """Nothing is ever ruled out."""

    def candidates(self, age: int) -> int:
        """How many candidates a row needs so that enough are left once those ruled out are gone."""
        options = self._options
        needed = options.beam_size + (options.beam_size > 1) + len(UNWRITABLE)
        if self.idle:
            return needed
        if options.sampling is not None:
            needed += (options.sampling.top_k or self._vocabulary) - 1
        repeats = age if options.no_repeat_ngram else 0
        return min(needed + len(options.suppressed) + repeats + (age + 1 < options.shortest), self._vocabulary)

    def forced(self, age: int) -> int | None:
        """The token that the prefix has here."""
        return self._options.prefix[age] if age < len(self._options.prefix) else None

    def apply(
        self,
        tokens: Int[np.ndarray, "row read"],
        log_probabilities: Float[np.ndarray, "row top"],
        ids: Int[np.ndarray, "row top"],
        forced_log_probability: float,
    ) -> None:
        """Rule out candidates, in place: their log-probability becomes minus infinity.

        Args:
            tokens: what each row has generated.
            log_probabilities: of the candidates of each row, best first.
            ids: the candidates.
            forced_log_probability: of the prefix's token here, in row 0.
        """
        options, age = self._options, tokens.shape[1]
        forced = self.forced(age)
        if forced is not None:
            log_probabilities[:], ids[0, 0] = -np.inf, forced
            log_probabilities[0, 0] = forced_log_probability
            return
        if age + 1 < options.shortest:
            log_probabilities[ids == END] = -np.inf
        if len(self._suppressed):
            log_probabilities[np.isin(ids, self._suppressed)] = -np.inf
        if options.no_repeat_ngram:
            for row, read in enumerate(tokens):
                log_probabilities[row, np.isin(ids[row], _repeats(read, options.no_repeat_ngram))] = -np.inf
        if self._draw is not None:
            self._sample(log_probabilities[0], self._draw)

    def _sample(self, log_probabilities: Float[np.ndarray, " top"], draw: np.random.Generator) -> None:
        sampling = self._options.sampling
        if sampling is None or not (allowed := np.flatnonzero(log_probabilities > -np.inf)).size:
            return
        allowed = allowed[: sampling.top_k or None]
        scaled = log_probabilities[allowed] / sampling.temperature
        weights = np.exp(scaled - scaled.max())
        weights /= weights.sum()
        # The fewest that reach top_p: those before which less than top_p has been gathered.
        weights *= np.cumsum(weights) - weights < sampling.top_p
        drawn = allowed[draw.choice(len(weights), p=weights / weights.sum())]
        chosen = log_probabilities[drawn]
        log_probabilities[:] = -np.inf
        log_probabilities[drawn] = chosen


def rule_out_unwritable(log_probabilities: Float[np.ndarray, "*shape"], ids: Int[np.ndarray, "*shape"]) -> None:
    """Rule out, in place, what stands for no text."""
    log_probabilities[(ids == PAD) | (ids == BEGIN)] = -np.inf


def _repeats(read: Sequence[int] | np.ndarray, size: int) -> list[int]:
    """Tokens that would make the last `size` tokens a run that was there before."""
    tokens = list(read)
    if len(tokens) < size:
        return []
    last = tokens[len(tokens) - size + 1 :]
    return [tokens[i + size - 1] for i in range(len(tokens) - size + 1) if tokens[i : i + size - 1] == last]
